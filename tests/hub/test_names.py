"""What names mean, without a network."""

import pytest

from engine.errors import DownloadError, InvalidRequestError
from engine.hub.names import HubName, RepoFile, models_of, the_one

PARTS = [f"Q8_0/Big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
FILES = {
    "README.md": 5,
    "Model-Q2_K.gguf": 100,
    "Model.q4_k_m.gguf": 200,
    "Model-UD-Q4_K_XL.gguf": 250,
    "Model-i1-IQ2_XXS.gguf": 90,
    "Model-BF16.gguf": 900,
    "mmproj-Model-F16.gguf": 50,
    "imatrix_unsloth.gguf": 3,
    "gpt-MXFP4.gguf": 220,
    **dict.fromkeys(PARTS, 300),
}


def models(names=FILES):
    return models_of([RepoFile(path, FILES.get(path, 1)) for path in names])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("hf:a/b", HubName("a/b")),
        ("hf:a/b.c-D_e:q4_k_m", HubName("a/b.c-D_e", "q4_k_m")),
        ("hf:a/b:Q8_0@v1.0", HubName("a/b", "Q8_0", "v1.0")),
        ("hf:a/b@refs/pr/3:Q8_0", HubName("a/b", "Q8_0", "refs/pr/3")),
        ("hf:a/b:dir/file-F16.gguf", HubName("a/b", "dir/file-F16.gguf")),
    ],
)
def test_names(text, parsed):
    assert HubName.parse(text) == parsed
    assert HubName.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text",
    ["hf:", "hf:a", "hf:a/", "hf:/b", "hf:a/b/c", "hf:a/b:", "hf:a/b@", "hf:a/../b", "hf:a/b:x:y", "hf:a/b@../x",
     "hf:a/b@/x", "hf:a--x/b", "hf:a/b c", "hf://a/b", "hf:a/ü", "hf:.a/b"],
)  # fmt: skip
def test_other_forms_are_refused(text):
    with pytest.raises(InvalidRequestError, match="hf:OWNER/REPO:QUANT"):
        HubName.parse(text)


@pytest.mark.parametrize(
    ("quant", "path"),
    [
        (None, "Model.q4_k_m.gguf"),
        ("q2_k", "Model-Q2_K.gguf"),
        ("UD-Q4_K_XL", "Model-UD-Q4_K_XL.gguf"),
        ("q4_k_xl", "Model-UD-Q4_K_XL.gguf"),
        ("iq2_xxs", "Model-i1-IQ2_XXS.gguf"),
        ("bf16", "Model-BF16.gguf"),
        ("mxfp4", "gpt-MXFP4.gguf"),
        ("Q8_0", PARTS[0]),
        ("model-q2_k", "Model-Q2_K.gguf"),
        ("Q8_0/Big-Q8_0-00002-of-00003.gguf", PARTS[0]),
    ],
)
def test_choice(quant, path):
    chosen = the_one(HubName("a/b", quant), models(), "there")
    assert chosen.files[0].path == path
    assert [file.path for file in chosen.files] == (PARTS if path in PARTS else [path])


def test_what_is_no_model_is_left_out():
    labels = [model.label for model in models()]
    assert labels == ["IQ2_XXS", "Q2_K", "q4_k_m", "MXFP4", "UD-Q4_K_XL", "BF16", "Q8_0"]  # by size


def test_the_only_model_needs_no_choice():
    assert the_one(HubName("a/b"), models(["tiny.gguf", "mmproj-F16.gguf"]), "there").label == "tiny"


def test_a_missing_quant_lists_what_there_is_with_sizes():
    with pytest.raises(DownloadError) as caught:
        the_one(HubName("a/b", "Q5_K_M"), models(["Model-Q2_K.gguf", *PARTS]), "in a/b")
    assert str(caught.value) == (
        "hf:a/b:Q5_K_M: no Q5_K_M in a/b; there is Q2_K (100 B), Q8_0 (900 B): choose one, as hf:a/b:Q2_K"
    )


def test_two_models_of_one_quant_are_told_by_their_files():
    with pytest.raises(DownloadError, match=r"Q4_K_M is 2 models .* x-Q4_K_M.gguf .*name the file: hf:a/b:x-Q4_K_M"):
        the_one(HubName("a/b"), models(["x-Q4_K_M.gguf", "y-Q4_K_M.gguf"]), "in a/b")
    both = models(["x-Q4_K_M.gguf", "y-Q4_K_M.gguf"])
    assert the_one(HubName("a/b", "Y-Q4_K_M.gguf"), both, "").files[0].path == "y-Q4_K_M.gguf"


def test_a_split_model_without_a_part_is_refused():
    with pytest.raises(DownloadError, match="found 2 of 3 parts"):
        the_one(HubName("a/b", "Q8_0"), models(PARTS[:2]), "in a/b")


@pytest.mark.parametrize(
    "path", ["../x-Q4_K_M.gguf", "/x.gguf", "a//x.gguf", "a/../../x.gguf", "a\\x.gguf", "c:x.gguf"]
)
def test_paths_that_leave_the_repository_are_no_models(path):
    assert models([path]) == []
