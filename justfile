# Short commands; `just` lists them. They use the environment that is active.

_list:
    @just --list --unsorted

# Run the tests that need no GPU; arguments go to pytest: just test tests/sampling -k top_p
test *arguments:
    pytest {{ arguments }}

# Run the tests that need a GPU.
test-gpu *arguments:
    pytest -m gpu {{ arguments }}

# Check style; kernels: lines that differ from the last commit.
lint:
    ruff check .
    ruff format --check .
    -git clang-format --diff --extensions cu,cuh

# Rewrite to the style.
format:
    ruff check --fix .
    ruff format .

# Check types.
types:
    mypy engine scripts examples

# Build the documentation into site/; warnings are errors. Needs pip install ".[docs]".
docs:
    mkdocs build --strict

# Print the import order of the parts, and of the folders of engine/cuda.
layers:
    python -m tests.layering

# Measure prompt and decode speed: just bench -m model.gguf --sequences 1,4,16
bench *arguments:
    gguf-engine bench {{ arguments }}

# Everything that has to pass.
ci:
    .ci/run
