"""Compare the machine code of every GPU kernel between two checkouts, on a machine without a GPU.

    python -m scripts.compare_kernels ../base                 # this checkout against another one
    python -m scripts.compare_kernels ../base --arch 90 --only gemm --models more/*.gguf

Kernels are collected as the launchers ask for them: for the conformance models, the feature models of the tests, files
of real models' shapes (sparse: headers only), and the jobs of the build test. NVRTC compiles each; the .text sections
are compared per kernel. Texts that differ in comments alone are not compiled, and those that give the same PTX are not
assembled. Results are cached by source text, so a second comparison compiles only what changed.
"""

import argparse
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MULTIPROCESSORS = {75: 40, 86: 84, 90: 132}
SYNTHETIC = [
    ("llama-3.2-1b", "Q8_0"),
    ("llama-3.1-8b", "Q4_K_M"),
    ("llama-3.1-8b", "BF16"),
    ("llama-3.1-70b", "Q3_K_M"),
    ("qwen2-0.5b", "Q4_K_M"),
    ("qwen3-0.6b", "Q5_K_M"),
    ("qwen3-8b", "Q4_0"),
    ("qwen3-30b-a3b", "Q4_K_M"),
    ("qwen3-30b-a3b", "Q2_K"),
]

# Runs inside a checkout. The functions are found by their definitions, as files may have moved between the two.
LISTER = r"""
import dataclasses, hashlib, importlib, json, re, sys
from pathlib import Path

target, files = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
cards = {int(arch): count for arch, count in json.loads(sys.argv[3]).items()}
ignored = set(json.loads(sys.argv[4]))
sys.path.insert(0, ".")

def find(folder, name):
    for path in sorted(Path(folder).rglob("*.py")):
        if re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.M):
            return getattr(importlib.import_module(".".join(path.with_suffix("").parts)), name)
    raise SystemExit(f"no function {name} in {folder}")

kernel_source, kernel_jobs = find("engine/cuda", "kernel_source"), find("engine/cuda", "kernel_jobs")
load_model, open_gguf = find("engine/model", "load_model"), find("engine/gguf", "open_gguf")
jobs_of_tests = find("tests", "jobs_for")
describe = find("engine/cuda/launch_plan", "describe")
Settings = sys.modules[describe.__module__].Settings
# The first field is the cache's number format: a KvType, or in older checkouts whether it is float16.
first = dataclasses.fields(Settings)[0].name
cache_of = (lambda kv_type: kv_type == "f16") if first == "cache_half" else sys.modules["engine.config"].KvType
jobs = {arch: list(jobs_of_tests(arch)) for arch in cards}
for file in files:
    try:
        with open_gguf(file) as gguf:
            model = load_model(gguf)
            for arch, count in cards.items():
                for kv_type in ("f16", "f32"):
                    for deterministic in (False, True) if arch == 90 else (False,):
                        settings = Settings(cache_of(kv_type), 64, 512, deterministic)
                        jobs[arch] += kernel_jobs(describe(model, (arch, count), settings))
            del model
    except Exception as error:
        if "not run on the GPU" not in str(error) and "lacks" not in str(error):
            raise SystemExit(f"{file}: {type(error).__name__}: {error}") from error
listing = {}
for arch, found in jobs.items():
    texts = {}
    for names, defines in found:
        label = f"{names[-1]} " + " ".join(f"{k}={v}" for k, v in sorted((defines or {}).items()) if k not in ignored)
        if label in texts:
            continue
        text = kernel_source(names, defines)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        (target / f"{name}.cu").write_text(text, encoding="utf-8")
        texts[label] = name
    listing[arch] = texts
print(json.dumps(listing))
"""


def stripped(source: str) -> str:
    """The text without comments, line directives and needless white space: what machine code can depend on."""
    source = re.sub(r"^#line .*\n", "", source, flags=re.M)
    source = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', lambda m: m.group(1) or " ", source, flags=re.S)
    return "\n".join(line for line in (re.sub(r"[ \t]+", " ", line).strip() for line in source.split("\n")) if line)


def digest(data: str | bytes) -> str:
    """A short name for a text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    names = elf[headers[names_at][4] :]
    for name, kind, _, _, offset, length, *_ in headers:
        yield names[name : names.index(b"\0", name)].decode(), b"" if kind == 8 else elf[offset : offset + length]


def fingerprint(cubin: bytes) -> dict[str, str]:
    """Kernel or function -> digest of its instructions; tables of constants likewise."""
    found = {}
    for name, data in sections(cubin):
        if name.startswith(".text.") or re.fullmatch(r"\.nv\.constant[1-9]\d*", name):
            found[re.sub(r"_INTERNAL_[0-9a-f]+_|_[0-9a-f]{8}_", "_", name)] = f"{digest(data)} {len(data)}"
    return found


class Compiler:
    """Compiles through NVRTC, with both stages cached on disk."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def ptx(self, source: Path, arch: int) -> str:
        """Digest of what the first stage makes of a source file."""
        text = source.read_text(encoding="utf-8")
        kept = self._cache / f"text-{arch}-{digest(stripped(text))}"
        if not kept.exists():
            ptx = self._compile(text, f"compute_{arch}{'a' if arch == 90 else ''}", ptx=True)
            self._write(kept, digest(re.sub(r"^//.*\n", "", ptx.decode(), flags=re.M).strip("\0\n")))
        return kept.read_text()

    def code(self, source: Path, arch: int) -> dict[str, str]:
        """Fingerprint of a source file for sm_<arch>."""
        kept = self._cache / f"ptx-{arch}-{self.ptx(source, arch)}"
        if not kept.exists():
            text = source.read_text(encoding="utf-8")
            cubin = self._compile(text, f"sm_{arch}{'a' if arch == 90 else ''}", ptx=False)
            kept.with_suffix(".cubin").write_bytes(cubin)
            self._write(kept, json.dumps(fingerprint(cubin)))
        return dict(json.loads(kept.read_text()))

    def cubin(self, source: Path, arch: int) -> Path:
        """The cubin of a source that code() has seen."""
        return self._cache / f"ptx-{arch}-{self.ptx(source, arch)}.cubin"

    @staticmethod
    def _write(path: Path, text: str) -> None:
        scratch = path.with_suffix(f".{os.getpid()}-{digest(text)}")
        scratch.write_text(text)
        scratch.replace(path)

    @staticmethod
    def _compile(text: str, target: str, *, ptx: bool) -> bytes:
        from cupy_backends.cuda.libs import nvrtc

        from engine.cuda.driver.compiler import BASE_OPTIONS

        program = nvrtc.createProgram(text, "kernels.cu", (), ())
        try:
            nvrtc.compileProgram(program, (*BASE_OPTIONS, f"-arch={target}"))
            result = nvrtc.getPTX(program) if ptx else nvrtc.getCUBIN(program)
            return result.encode() if isinstance(result, str) else bytes(result)
        except nvrtc.NVRTCError as error:
            raise SystemExit(f"{target}: {error}\n{nvrtc.getProgramLog(program)}") from None
        finally:
            nvrtc.destroyProgram(program)


def sparse_models(folder: Path) -> Iterator[Path]:
    """Files of real models' shapes whose matrices are holes: kernels depend on shapes and types alone."""
    from scripts.make_synthetic_gguf import header, metadata
    from scripts.synthetic_models import plan
    from scripts.synthetic_shapes import SHAPES

    for name, recipe in SYNTHETIC:
        shape, path = replace(SHAPES[name], rope_factor=0.0), folder / f"{name}-{recipe}.gguf"  # no factors to write
        tensors = plan(shape, recipe)
        head = header(metadata(shape, name, recipe), tensors)
        with path.open("wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(-(-t.n_bytes // 32) * 32 for t in tensors))
        yield path


def models_of_tests(folder: Path) -> Iterator[Path]:
    """The conformance models, where their archive is found, and the feature models of the tests."""
    from tests.conftest import SHARED
    from tests.support.models.feature_models import CASES, LATENT_CASES, latent

    archive = SHARED / "conformance" / "models.tar.xz"
    if archive.is_file():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    yield from sorted(folder.rglob("*.gguf"))
    for i, make in enumerate([*CASES, *((lambda case=case: latent(*case)) for case in LATENT_CASES)]):
        place = folder / f"feature-{i}"
        place.mkdir()
        yield Path(make()[0].write(place))


def list_jobs(
    checkout: Path, sources: Path, models: Path, arches: list[int], ignored: list[str]
) -> dict[str, dict[str, str]]:
    """Architecture -> label of a job -> name of its source text, as the checkout's own launchers give them."""
    cards = json.dumps({arch: MULTIPROCESSORS[arch] for arch in arches})
    command = [sys.executable, "-c", LISTER, str(sources), str(models), cards, json.dumps(ignored)]
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Command line; 1 where a kernel differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="checkout to compare with")
    parser.add_argument("--arch", type=int, action="append", choices=MULTIPROCESSORS, help="default: all of them")
    parser.add_argument("--only", default="", help="kernel files whose name contains this")
    parser.add_argument(
        "--renamed", action="append", default=[], metavar="OLD=NEW", help="a kernel file that the base calls OLD"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="DEFINE", help="a define that only one of them has"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth source of a kernel file")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="further GGUF files")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "compare-kernels")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    sources = args.cache / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    arches = args.arch or list(MULTIPROCESSORS)
    with tempfile.TemporaryDirectory() as folder:
        models = [*models_of_tests(Path(folder)), *sparse_models(Path(folder)), *args.models]
        listed = Path(folder) / "models.json"
        listed.write_text(json.dumps([str(path.resolve()) for path in models]))
        before, after = (list_jobs(path, sources, listed, arches, args.ignore) for path in (args.base, ROOT))
    names = dict(pair.split("=", 1) for pair in args.renamed)
    for arch, texts in before.items():
        split = {label: label.partition(" ") for label in texts}
        before[arch] = {f"{names.get(split[k][0], split[k][0])} {split[k][2]}": text for k, text in texts.items()}
    compiler, failed, same = Compiler(args.cache), 0, 0
    for arch in arches:
        old, new = before[str(arch)], after[str(arch)]
        for label in sorted(old.keys() ^ new.keys()):
            print(f"sm_{arch} {label}: only in {'the base' if label in old else 'this checkout'}")
        labels = sorted(label for label in old.keys() & new.keys() if args.only in label.split()[0])
        files = {
            file: [label for label in labels if label.split()[0] == file] for file in {k.split()[0] for k in labels}
        }
        labels = [label for file in sorted(files) for label in files[file][:: args.every]]

        def both(label: str, arch: int = arch, old: dict[str, str] = old, new: dict[str, str] = new) -> list[str]:
            a, b = (sources / f"{texts[label]}.cu" for texts in (old, new))
            if compiler.ptx(a, arch) == compiler.ptx(b, arch):  # the second stage would make the same of both
                return []
            of_a, of_b = (compiler.code(path, arch) for path in (a, b))
            changed = sorted(name for name in of_a.keys() | of_b.keys() if of_a.get(name) != of_b.get(name))
            where = f"\n    {compiler.cubin(a, arch)}\n    {compiler.cubin(b, arch)}"
            return [f"{name}: {of_a.get(name)} -> {of_b.get(name)}{where}" for name in changed]

        with ThreadPoolExecutor(args.threads) as pool:  # NVRTC runs without the interpreter lock
            for done, (label, changes) in enumerate(zip(labels, pool.map(both, labels), strict=True), 1):
                same += not changes
                failed += bool(changes)
                for change in changes:
                    print(f"sm_{arch} {label}: {change}", flush=True)
                if sys.stderr.isatty() or done % 100 == 0:
                    print(f"\rsm_{arch} {done}/{len(labels)}", end="", file=sys.stderr, flush=True)
        print(f"\rsm_{arch} {len(labels)}/{len(labels)}", file=sys.stderr)
    print(f"{same} sources give the same machine code, {failed} do not")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
