"""Names of models on the hub, and which files of a repository a name means. Knows neither network nor disk.

Several `.gguf` files of a repository can be one model (parts of a split file) or none (vision projectors, importance
matrices). A model goes by its quantization, which repositories write into the file name or the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from engine.errors import DownloadError, InvalidRequestError
from engine.split_names import part_name
from engine.units import size_text

SCHEME = "hf:"
DEFAULT_QUANT = "Q4_K_M"
DEFAULT_REVISION = "main"
SHOWN = 40
"""Models that an error lists at most."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w./+-]+", re.ASCII)
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q[1-8](?:_[A-Za-z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|B?F16|FP16|F32|FP32)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_FORM = "hf:OWNER/REPO, hf:OWNER/REPO:QUANT or hf:OWNER/REPO:QUANT@REVISION, as hf:unsloth/Qwen3-0.6B-GGUF:Q8_0"


def is_hub_name(text: str) -> bool:
    """Whether a text names a model on the hub; a file called so is written ./hf:..."""
    return text.startswith(SCHEME)


@dataclass(frozen=True)
class HubName:
    """A parsed name.

    Attributes:
        repo: OWNER/REPO.
        quant: the quantization or the file asked for; None takes DEFAULT_QUANT, or the only one there is.
        revision: a branch, a tag or a commit.
    """

    repo: str
    quant: str | None = None
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> HubName:
        """The name that a text is; quant and revision may come in either order.

        Raises:
            InvalidRequestError: the text has another form.
        """
        repo, *rest = re.split(r"(?=[:@])", text.removeprefix(SCHEME))
        given = {piece[0]: piece[1:] for piece in rest}
        quant, revision = given.get(":"), given.get("@", DEFAULT_REVISION)
        if (
            not is_hub_name(text)
            or len(given) < len(rest)
            or not _REPO.fullmatch(repo)
            or ".." in repo
            or "--" in repo
            or quant == ""
            or not _REVISION.fullmatch(revision)
            or any(piece in ("", ".", "..") for piece in revision.split("/"))
        ):
            raise InvalidRequestError(f"the model name is {text!r}; it has the form {_FORM}")
        return cls(repo, quant, revision)

    @classmethod
    def typed(cls, text: str) -> HubName:
        """The name in a place where no file can be meant: there it may go without the scheme."""
        return cls.parse(text if is_hub_name(text) else SCHEME + text)

    def with_quant(self, quant: str | None) -> HubName:
        """The same repository and revision with another choice."""
        return HubName(self.repo, quant, self.revision)

    def __str__(self) -> str:
        quant = "" if self.quant is None else f":{self.quant}"
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{SCHEME}{self.repo}{quant}{revision}"


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository.

    Attributes:
        path: its name inside the repository, with forward slashes.
        size: bytes.
        sha256: digest that the hub keeps of it, in hexadecimal; "" where it keeps none.
    """

    path: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class RepoModel:
    """A model of a repository: one file, or all parts of a split one in order.

    Attributes:
        label: its quantization as the file name has it, or the file's name where it has none.
        files: the parts that there are.
        n_parts: how many there have to be.
    """

    label: str
    files: tuple[RepoFile, ...]
    n_parts: int = 1

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(file.size for file in self.files)

    @property
    def complete(self) -> bool:
        """Whether no part is missing."""
        return len(self.files) == self.n_parts

    def named(self, quant: str) -> bool:
        """Whether this is the label, or the path or name of one of the files, in any case of letters."""
        wanted = quant.lower().removesuffix(".gguf")
        paths = [file.path.lower().removesuffix(".gguf") for file in self.files]
        return wanted == self.label.lower() or any(wanted in (path, PurePosixPath(path).name) for path in paths)


def is_safe_path(path: str) -> bool:
    """Whether a path that the hub gave is one inside the repository; nothing else may become a name on disk."""
    pieces = path.split("/")
    return not any(piece in ("", ".", "..") or "\\" in piece or "\0" in piece or ":" in piece for piece in pieces)


def models_of(files: Iterable[RepoFile]) -> list[RepoModel]:
    """The models that the files of a repository are, the smallest first.

    Vision projectors (mmproj), importance matrices and files without the ending .gguf are none.
    """
    groups: dict[tuple[str, int], dict[int, RepoFile]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if path.suffix.lower() != ".gguf" or "mmproj" in path.name.lower() or not is_safe_path(file.path):
            continue
        part = part_name(path.name)
        stem = part.stem if part else path.name[: -len(".gguf")]
        if "imatrix" in stem.lower() and not _QUANT.search(stem):
            continue
        count, number = (part.count, part.number) if part else (1, 1)
        groups.setdefault((str(path.parent / stem), count), {})[number] = file
    found = [
        RepoModel(_label(stem), tuple(parts[number] for number in sorted(parts)), count)
        for (stem, count), parts in groups.items()
    ]
    return sorted(found, key=lambda model: (model.size, model.label))


def _label(path: str) -> str:
    """The quantization in a path without its ending: that of the name, else of the folder, else the name itself."""
    for piece in reversed(PurePosixPath(path).parts):
        if matches := _QUANT.findall(piece):
            return str(matches[-1])
    return PurePosixPath(path).name


def choose(models: Sequence[RepoModel], quant: str | None) -> list[RepoModel]:
    """The models that a choice means; exactly one is a clear choice.

    Without a choice it is DEFAULT_QUANT, or the only model there is. A label may be given without its first part:
    Q4_K_XL for UD-Q4_K_XL.
    """
    wanted = quant or DEFAULT_QUANT
    chosen = [model for model in models if model.named(wanted)]
    if not chosen:
        chosen = [model for model in models if model.label.lower().endswith(f"-{wanted.lower()}")]
    if not chosen and quant is None and len(models) == 1:
        chosen = list(models)
    return chosen


def the_one(name: HubName, models: Sequence[RepoModel], where: str) -> RepoModel:
    """The model that a name means.

    Raises:
        DownloadError: there is none or there are several; lists what there is, with sizes.
    """
    chosen = choose(models, name.quant)
    if len(chosen) == 1:
        if not chosen[0].complete:
            raise DownloadError(
                f"{name}: found {len(chosen[0].files)} of {chosen[0].n_parts} parts {where}: "
                "choose another quantization, or tell the owner of the repository"
            )
        return chosen[0]
    wanted = name.quant or DEFAULT_QUANT
    if chosen:
        files = ", ".join(f"{model.files[0].path} ({size_text(model.size)})" for model in chosen[:SHOWN])
        example = name.with_quant(PurePosixPath(chosen[0].files[0].path).name)
        raise DownloadError(f"{name}: {wanted} is {len(chosen)} models {where}: {files}; name the file: {example}")
    example = name.with_quant(models[0].label)
    raise DownloadError(f"{name}: no {wanted} {where}; there is {listing(models)}: choose one, as {example}")


def listing(models: Sequence[RepoModel]) -> str:
    """Labels and sizes on one line."""
    shown = ", ".join(f"{model.label} ({size_text(model.size)})" for model in models[:SHOWN])
    return shown + (f" and {len(models) - SHOWN} more" if len(models) > SHOWN else "")
