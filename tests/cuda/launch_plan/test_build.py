"""NVRTC builds every GPU kernel for every architecture, on a machine without a GPU; the numbers both sides name agree.

A full cross product would take minutes. Every kernel file is built for every architecture, with the defines that the
launchers really use; tensor types and head widths rotate over the architectures in the middle, and the oldest and the
newest that has instructions of its own get them all (rare types: the latter only).
"""

import ast
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.config import KvType
from engine.cuda.formats.grid_tables import grid_bytes
from engine.cuda.formats.layouts import LAYOUTS
from engine.gguf.types import GGMLType
from tests.conftest import ROOT
from tests.support.damage import WAYS, fill_disk

ARCHES = (75, 80, 86, 89, 90, 120)
COMPLETE = (75, 90)
MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 120: 170}
TYPES = tuple(LAYOUTS)
COMMON = TYPES[: TYPES.index(GGMLType.Q6_K) + 1]
"""Types that most files have: built for every architecture. The others take turns and are complete on Hopper only."""
RARE = TYPES[len(COMMON) :]
WIDTHS = (64, 80, 96, 112, 128, 256)
WIDTHS_OF_BYTES = (64, 96, 128, 256)
FLOATS = (KvType.F16, KvType.F32)
MAMBA_SHAPES = ((5120, 16, 4, 160), (100, 8, 2, 5), (64, 64, 8, 4), (33, 10, 3, 3), (64, 256, 4, 4))
MAMBA_2_SHAPES = ((128, 64, 8, 128, 4), (2, 256, 2, 128, 4), (3, 20, 1, 10, 3), (4, 32, 2, 256, 2))
DELTA_SHAPES = ((32, 16, 128, 4), (4, 2, 16, 4), (3, 3, 20, 3))
TIME_MIX_SHAPES = ((64, 64, False), (40, 128, True), (3, 10, False))
CONVOLUTIONS = ((2048, 3, 6144, 0, True), (33, 4, 99, 0, True), (40, 2, 44, 4, False))

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed", exc_type=ImportError)
try:
    nvrtc.getVersion()
except Exception as error:
    pytest.skip(f"NVRTC cannot be loaded: {error}", allow_module_level=True)


def shape_of(width, *, half=True, heads=8, kv_heads=2, rope_dim=None, kv_type=None):
    from engine.cuda.attention.attention_shape import AttentionShape, KernelRopeStyle

    style = KernelRopeStyle.HALVES if width % 32 else KernelRopeStyle.ADJACENT
    kv_type = kv_type or (KvType.F16 if half else KvType.F32)
    return AttentionShape(heads, kv_heads, width, width, width if rope_dim is None else rope_dim, style, kv_type)


def shapes_for(arch):
    """Tensor cores of one or all widths, then the general kernels: a float32 cache and what they alone serve."""
    from engine.cuda.attention.attention_shape import AttentionShape, KernelRopeStyle

    turn = ARCHES.index(arch)
    widths = WIDTHS if arch == 90 else {WIDTHS[turn], 256} if arch == 75 else {WIDTHS[turn]}
    tensor = [shape_of(width, heads=(2, 8, 16)[i % 3]) for i, width in enumerate(sorted(widths))]
    widths = WIDTHS_OF_BYTES if arch == 90 else (WIDTHS_OF_BYTES[turn % 4],)
    tensor += [shape_of(width, heads=(8, 2, 16)[i % 3], kv_type=KvType.Q8_0) for i, width in enumerate(widths)]
    general = [shape_of(WIDTHS[(turn + 2) % 6], half=False), shape_of((40, 36, 100)[turn % 3], rope_dim=20)]
    alibi = AttentionShape(6, 2, 64, 64, 0, KernelRopeStyle.ADJACENT, FLOATS[turn % 2 - 1], alibi=True)
    latent = AttentionShape(
        (16, 5)[turn % 2], 1, 576, 512, 0, KernelRopeStyle.ADJACENT, FLOATS[turn % 2 - 1], values_in_keys=True
    )
    texts = AttentionShape(
        8,
        2,
        64,
        64,
        0,
        KernelRopeStyle.HALVES,
        FLOATS[turn % 2],
        distances=(0, 128)[turn // 2 % 2],
        both_ways=True,
    )
    biased_bytes = AttentionShape(6, 2, 64, 64, 0, KernelRopeStyle.ADJACENT, KvType.Q8_0, alibi=True)
    general += [alibi, latent, texts, biased_bytes]
    return tensor + (general if arch in COMPLETE else general[turn % 2 :][:1])


def batch_jobs(family):
    """Products of many sequences: every type, every number of sequences, alone and sharing columns in a cluster."""
    cut = (family.Cut(4, 1), family.Cut(2, 4))
    types = [type for type in COMMON + RARE[::5] if family.supported([type], 90)]
    groups = [types[i : i + 4] for i in range(0, len(types), 4)]
    jobs = [family.kernel_job(group, cut[i % 2], 4096, 8 << i) for i, group in enumerate(groups)]
    jobs += [family.kernel_job([type], cut[i % 2], 4096, (1, 12, 32, 64)[i % 4]) for i, type in enumerate(types)]
    for i, type in enumerate(types):  # every format by itself and in a cluster
        many = {"paired": True, "activation": 1, "ready": True, "halves": True}
        jobs.append(family.kernel_job([type], family.Cut(4, 1 + i % 2), 4096, (64, 32)[i // 2 % 2], **many))
    return [family.operand_job(), *jobs]


def recurrent_shapes():
    from engine.cuda.recurrent.convolution import ConvShape
    from engine.cuda.recurrent.delta import DeltaShape
    from engine.cuda.recurrent.lightning import LightningShape
    from engine.cuda.recurrent.mamba_2 import Mamba2Shape
    from engine.cuda.recurrent.mamba_plan import MambaShape
    from engine.cuda.recurrent.ngrams.ngrams import NgramShape
    from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6Shape
    from engine.cuda.recurrent.rwkv.rwkv_7 import MAX_CHUNK_HEAD, Rwkv7Shape

    delta = [
        DeltaShape(*shape, 9000, grouped, key, key, -5.0 * key)
        for shape in DELTA_SHAPES
        for grouped, key in ((True, False), (True, True))
    ]
    shapes = [ConvShape(*shape) for shape in CONVOLUTIONS], [MambaShape(*shape) for shape in MAMBA_SHAPES]
    heads = [Mamba2Shape(*shape) for shape in MAMBA_2_SHAPES], [LightningShape(4, 96, 1600), LightningShape(3, 20, 240)]
    mixes = [Rwkv6Shape(*shape, 1, linear) for shape, linear in zip(TIME_MIX_SHAPES, (False, True, False), strict=True)]
    mixes += [Rwkv7Shape(heads, min(head, MAX_CHUNK_HEAD), channels) for heads, head, channels in TIME_MIX_SHAPES]
    grams = [NgramShape(3, 8, 4, 8192, 2048), NgramShape(2, 1, 2, 40, 40)]
    return [shape for kind in (*shapes, *heads, delta, mixes, grams) for shape in kind]


def indexed_shapes(arch):
    """Indexers with the heads that read what they choose: of single positions, and of blocks."""
    from engine.cuda.attention.attention_shape import AttentionShape, KernelRopeStyle
    from engine.cuda.indexer.plan import IndexerShape, Pool

    other = FLOATS[ARCHES.index(arch) % 2]
    latent = AttentionShape(128, 1, 576, 512, 0, KernelRopeStyle.ADJACENT, KvType.F16, values_in_keys=True)
    return [
        (IndexerShape(64, 128, 2048, 1, 0, False, 2048, KvType.F16), latent),
        *((IndexerShape(32, 128, 512, 4, 0, False, 2051, other, pool), latent) for pool in (Pool.MEAN, Pool.GATES)),
        (IndexerShape(2, 128, 16, 128, 1, True, 2048, other), shape_of(128, half=other is KvType.F16)),
    ]


def block_shapes(arch):
    """Layers with compressed blocks: with an index, with all blocks, with a window alone."""
    from engine.cuda.compressed.plan import BlockShape

    other, rope = tuple(KvType)[ARCHES.index(arch) % 2], (64, False)
    return [
        BlockShape(64, 512, 128, 4, True, 64, 128, 512, *rope, KvType.F16),
        BlockShape(64, 512, 128, 128, False, 0, 0, 0, *rope, other),
        BlockShape(4, 72, 6, 0, False, 0, 0, 0, 20, True, other),
    ]


def jobs_for(arch):
    """(files, defines) pairs, as the launchers hand them to compiler.prebuild."""
    from engine.cuda.attention import attention_plan, step_rows
    from engine.cuda.driver import staging
    from engine.cuda.experts import adjugate, moe, moe_rows, router, token_experts
    from engine.cuda.experts import prefill as experts
    from engine.cuda.formats import dequant, repack
    from engine.cuda.indexer.plan import head_tile
    from engine.cuda.matrix import decode_gemm_plan, float_gemm, gemm_plan, matvec_plan
    from engine.cuda.recurrent.rwkv import token_shift
    from engine.cuda.rows import parts, pooling, rows, skips, streams
    from engine.cuda.rows.activation import KernelActivation
    from engine.cuda.sampling import sampler as sampling_ops

    turn = ARCHES.index(arch)
    jobs = [
        (rows.FILES, None),
        (parts.FILES, None),
        (pooling.FILES, None),
        (streams.FILES, None),
        (skips.FILES, None),
        (adjugate.FILES, None),
        (token_experts.FILES, None),
        (staging.FILES, None),
        sampling_ops.job(sampling_ops.FEW_THREADS),
        sampling_ops.job(sampling_ops.MANY_THREADS),
        (step_rows.FILES, step_rows.DEFINES),
        token_shift.shift_job(),
    ]
    rare = RARE if arch == 90 else RARE[turn::6]
    for type in (COMMON if arch in COMPLETE else COMMON[turn % 4 :: 4]) + rare:
        jobs += [repack.build_job(type), *dequant.build_jobs(type)]
    q4, q6 = GGMLType.Q4_K, GGMLType.Q6_K
    jobs += [matvec_plan.build_job(COMMON[i : i + 4], 1, arch) for i in range(0, len(COMMON), 4)]
    jobs += [matvec_plan.build_job(RARE[turn::6], 1, arch)]
    jobs += [matvec_plan.build_job([q4, q4, q6], batch, arch) for batch in {1, matvec_plan.max_batch(arch)}]
    alone = TYPES if arch == 90 else TYPES[turn % 4 :: 4]
    jobs += [matvec_plan.build_job([type], (1, 2, 4, 8)[i % 4], arch) for i, type in enumerate(alone) if arch == 90]
    jobs += [matvec_plan.build_job([type], 2, arch) for type in alone[:2] if arch != 90]
    jobs += batch_jobs(decode_gemm_plan) if arch == 90 else []
    if arch == 90:
        jobs.append(matvec_plan.operand_job())
        for types, tiles, columns in (([q4, q4, q6], 384, 4096), ([q6], 256, 14336), ([GGMLType.Q8_0], 12, 512)):
            block = matvec_plan.operand_block(types, tiles, columns, 4, (90, 132))
            assert block is not None
            jobs.append(matvec_plan.kernel_job(types, tiles, columns, 4, (90, 132), operand=block)[0])
    routing = router.KernelRouting(128, 8, gating=tuple(router.Gating)[turn % len(router.Gating)])
    jobs += [router.router_job(type, arch) for type in matvec_plan.UNQUANTIZED]
    for type in (COMMON if arch == 90 else COMMON[turn % 4 :: 4]) + RARE[turn::6]:
        activation = tuple(KernelActivation)[turn % len(KernelActivation)]
        jobs += moe.build_jobs(type, type, activation, routing, arch, 768, 2048)
    if arch >= float_gemm.ARCH:
        jobs += float_gemm.build_jobs(arch)
    if arch == gemm_plan.ARCH:
        jobs += gemm_plan.build_jobs([q4, q6], KernelActivation.SILU)
        jobs += [gemm_plan.build_job([q4, q6], tile, KernelActivation.SILU) for tile in gemm_plan.STEP_TILES]
        jobs += gemm_plan.expert_jobs([q4, q6], [q4], KernelActivation.SILU) + experts.build_jobs()
        for type in COMMON + RARE[turn::6]:
            if type is not GGMLType.F32:
                jobs += moe_rows.build_jobs(type, type, KernelActivation.SILU, routing, 768, 2048)
    for shape in recurrent_shapes()[:: 1 if arch == 90 else 2]:
        jobs += shape.build_jobs()
    for shape, heads in indexed_shapes(arch):
        jobs += [shape.append_job(), shape.scores_job(), shape.scores_job(plain=True), shape.choose_job()]
        for tile in (head_tile(heads), head_tile(heads, plain=True)):
            jobs += [shape.attention_job(heads, tile), shape.merge_job(heads, tile)]
    for shape in block_shapes(arch):
        index = () if shape.index is None else (shape.index.scores_job(), shape.index.choose_job())
        keys = (shape.keys_job(),) if shape.length else ()
        jobs += [shape.append_job(), *keys, *index, *shape.attention_jobs()]
    for shape in shapes_for(arch):
        jobs += attention_plan.build_jobs(shape, arch, MULTIPROCESSORS[arch])
        if arch == 90:  # the kernels of the other cards serve there too where the tests ask for them
            general = attention_plan.prefill_plan(shape, arch, hopper=False)
            decode = attention_plan.decode_plan(shape, arch, MULTIPROCESSORS[arch])
            jobs += attention_plan.jobs_of_plans(shape, decode, general)
    return list({repr(job): job for job in jobs}.values())


def build_all(jobs, arch):
    from engine.cuda.driver.compiler import cached_cubin, kernel_source

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # NVRTC runs without the interpreter lock
        return list(pool.map(lambda job: cached_cubin(kernel_source(*job), arch, (), job[0][-1]), jobs))


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_builds(arch):
    if arch not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    jobs = jobs_for(arch)
    for (files, defines), cubin in zip(jobs, build_all(jobs, arch), strict=True):
        assert cubin[:4] == b"\x7fELF"
        for name in kernel_names(files[-1], (defines or {}).get("FORMAT")):
            assert f".text.{name}\0".encode() in cubin, (name, files, defines)


def kernel_names(file, type):
    """The names by which the launchers ask for the kernels of a file."""
    if file.startswith(("attention_", "index_")):
        return ["_".join(file.removesuffix(".cu").split("_")[:2])]
    names = {
        "rows.cu": "normalize_half normalize_float gate add_bias add_scaled add_gated copy_rows read_all",
        "parts.cu": "normalize_pieces rotate_pieces clamp softcap clear multiply_gate scale add_times silence divide "
        "add_chosen weigh_chosen_rows thin_out",
        "streams.cu": "altup_predict altup_correct altup_add altup_lengthen",
        "skips.cu": "fill_streams bank_read bank_write hyper_read gated_read gated_write mixed_write sum_streams",
        "pooling.cu": "pool_rows",
        "adjugate.cu": "adjugate_weights",
        "token_experts.cu": "keep_named",
        "block_append.cu": "block_append",
        "block_keys.cu": "block_keys",
        "merge_chosen.cu": "merge_chosen",
        "moves.cu": "scatter copy_pages gather_rows",
        "step_rows.cu": "take_rows",
        "conv.cu": "conv_decode conv_prompt",
        "scan.cu": "scan_decode scan_prompt",
        "mamba_2.cu": "mamba_2_decode mamba_2_prompt",
        "lightning.cu": "lightning_decode lightning_prompt",
        "delta.cu": "delta_decode delta_prompt delta_finish",
        "mamba_2_chunks.cu": "mamba_2_chunks mamba_2_walk",
        "delta_chunks.cu": "delta_chunks delta_walk",
        "rwkv_6.cu": "rwkv_6_decode rwkv_6_prompt rwkv_6_finish",
        "rwkv_7.cu": "rwkv_7_decode rwkv_7_prepare rwkv_7_prompt rwkv_7_finish",
        "rwkv_6_chunks.cu": "rwkv_6_chunks rwkv_6_walk",
        "rwkv_7_chunks.cu": "rwkv_7_chunks rwkv_7_walk",
        "token_shift.cu": "shift_decode shift_prompt shift_further",
        "ngrams.cu": "ngram_rows_decode ngram_rows_prompt ngram_gate ngram_conv_decode ngram_conv_prompt ngram_keep",
        "sampling.cu": "sample",
        "matvec.cu": "matvec",
        "matvec_operand.cu": "matvec_operand",
        "decode_gemm.cu": "batch_matvec",
        "decode_gemm_operand.cu": "batch_operand",
        "gemm.cu": "gemm",
        "float_gemm.cu": "float_gemm",
        "float_few.cu": "float_few",
        "operand.cu": "operand_half",
        "rope_append.cu": "rope_append",
        "embed.cu": f"embed_{type}",
        "dequant.cu": f"dequant_half_{type} dequant_float_{type}",
        "experts.cu": "group_rows add_experts",
        "route.cu": "route_top",
        "router.cu": "router",
        "moe.cu": "moe_gate_up moe_down",
        "moe_rows.cu": "moe_rows_gate_up moe_rows_down",
        "moe_rows_begin.cu": "moe_rows_begin moe_rows_end",
        "repack.cu": f"repack_{type} largest_{type} choose_scale_{type}",
    }[file].split()
    return [name for name in names if type in ("F32", "BF16") or not name.startswith(("largest", "choose"))]


def read_file(name):
    from engine.cuda.driver.compiler import kernel_files

    return kernel_files()[name].read_text(encoding="utf-8")


def test_every_kernel_file_is_built():
    from engine.cuda.driver.compiler import kernel_files

    files = {name for job in jobs_for(90) for name in job[0]} | {"common.cuh"}
    assert files == kernel_files().keys()
    hopper = {"experts.cu", "moe_rows.cu", "moe_rows_begin.cu", "operand.cu", "gemm.cu", "attention_prefill_hopper.cu"}
    hopper.add("matvec_operand.cu")
    hopper |= {name for name in files if name.startswith("decode_gemm")} | {
        "formats_half.cuh",
        "gemm_unpack.cuh",
        "moe_rows_columns.cuh",
        "prefill_stages.cuh",
        "prefill_pages_half.cuh",
        "prefill_pages_q8.cuh",
    }
    floats = {"float_gemm.cu", "float_few.cu"}  # TF32
    for arch in ARCHES:
        built = {name for job in jobs_for(arch) for name in job[0]} | {"common.cuh"}
        assert files - built == (set() if arch == 90 else hopper | floats if arch < 80 else hopper), arch


def test_every_type_and_width_is_built_somewhere():
    names = {str(job[1].get("FORMAT")) for arch in ARCHES for job in jobs_for(arch) if job[1]}
    assert {type.name for type in TYPES} <= names
    assert {shape.key_dim for arch in ARCHES for shape in shapes_for(arch) if shape.tensor_cores} == set(WIDTHS)


def check_statically(files, defines, claims):
    """The compiler itself judges: a false claim does not build."""
    from engine.cuda.driver.compiler import compile_cubin, kernel_source

    source = kernel_source(files, defines) + "".join(f'static_assert({c}, "{c}");\n' for c in claims)
    compile_cubin(source, 80, name="claims.cu")


def test_sizes_of_formats_equal_the_layouts():
    claims = []
    for type, layout in LAYOUTS.items():
        claims += [
            f"{type.name}::BLOCK == {type.block_size}",
            f"{type.name}::BLOCK_BYTES == {type.type_size}",
            f"{type.name}::COLUMNS == {layout.chunk_columns}",
            f"{type.name}::CHUNK_BYTES == {layout.chunk_bytes}",
            f"{type.name}::HAS_SCALE == {int(layout.scaled)}",
        ]
        if grid_bytes([type]):
            claims += [f"sizeof({type.name}_POINTS) == {grid_bytes([type])}"]
    check_statically(("formats.cuh", "formats_coded.cuh"), {type.name: type.name for type in LAYOUTS}, claims)


def test_a_false_claim_does_not_build():
    from engine.errors import DeviceError

    with pytest.raises(DeviceError, match="static assertion failed"):
        check_statically(("formats.cuh",), None, ["Q4_K::CHUNK_BYTES == 16"])


def test_constants_of_the_launchers_equal_the_kernels():
    from engine.cuda.experts import moe_rows, router
    from engine.cuda.matrix import matvec_plan
    from engine.cuda.recurrent import delta, mamba_2, mamba_plan, plan
    from engine.cuda.recurrent.ngrams import ngrams
    from engine.cuda.recurrent.rows import CHUNK, TILE
    from engine.cuda.recurrent.rwkv import rwkv_6, rwkv_7, token_shift
    from engine.cuda.recurrent.rwkv import shape as time_mix
    from engine.cuda.rows.activation import KernelActivation
    from engine.cuda.sampling import sampler as sampling_ops

    row, most = sampling_ops.ROW, sampling_ops.MAXIMA
    claims = [f"sizeof(SamplingRow) == {row.itemsize}", f"MAXIMA == {most}"]
    claims += [f"CANDIDATES == {sampling_ops.CANDIDATES}", f"BINS == {sampling_ops.BINS}"]
    for size in (sampling_ops.FEW_THREADS, sampling_ops.MANY_THREADS):
        check_statically(*sampling_ops.job(size), claims)
    for shape in (mamba_plan.MambaShape(*shape) for shape in MAMBA_SHAPES):
        conv, scan = shape.build_jobs()
        check_statically(*conv, [f"TILE == {TILE}"])
        check_statically(*scan, [f"THREADS == {mamba_plan.THREADS}", f"CHANNELS == {shape.channels}"])
    for shape in (mamba_2.Mamba2Shape(*shape) for shape in MAMBA_2_SHAPES):
        claims = [f"THREADS == {mamba_2.THREADS}", f"CHANNELS == {mamba_2.CHANNELS}"]
        claims += [f"SLICES == {shape.decode_blocks}", f"PARTS == {shape.prompt_blocks}"]
        check_statically(*shape.build_jobs()[1], claims)
    for shape in (delta.DeltaShape(*shape, 9000, True, True, True) for shape in DELTA_SHAPES):
        claims = [
            f"THREADS == {delta.THREADS}",
            f"DECODE_THREADS == {delta.DECODE_THREADS}",
            f"VALUES == {delta.VALUES}",
        ]
        check_statically(*shape.build_jobs()[1], [*claims, f"BLOCKS == {shape.prompt_blocks}"])
    for mixes in (rwkv_6.Rwkv6Shape(*shape, 1, False) for shape in TIME_MIX_SHAPES):
        claims = [f"THREADS == {time_mix.THREADS}", f"DECODE_THREADS == {time_mix.DECODE_THREADS}"]
        claims += [f"VALUES == {time_mix.VALUES}", f"{mixes.heads} * PARTS == {mixes.prompt_blocks}"]
        check_statically(*mixes.build_jobs()[0], claims)
        check_statically(*rwkv_7.Rwkv7Shape(mixes.heads, mixes.head, False).build_jobs()[0], claims)
    check_statically(*token_shift.shift_job(), [f"TILE == {TILE}", f"THREADS == {token_shift.THREADS}"])
    threads, values = plan.WALK_THREADS, plan.WALK_VALUES
    walk = [f"CHUNK == {CHUNK}", f"WALK_THREADS == {threads}", f"WALK_VALUES == {values}"]
    walk += [f"RECORD == {plan.RECORD}", f"PAIRED_RECORD == {plan.PAIRED_RECORD}"]
    chunked = delta.DeltaShape(2, 2, 128, 4, 9000, True, True, True)
    check_statically(*chunked.build_jobs()[-1], [*walk, f"2 * CHUNKED == {chunked.chunk_width}"])
    grams = ngrams.NgramShape(3, 8, 4, 8192, 2048)
    claims = [f"TILE == {TILE}", f"ROWS == {grams.rows}", f"PAST == {grams.state_shapes[0][0]}"]
    check_statically(*grams.build_jobs()[0], claims)
    most = mamba_2.Mamba2Shape(2, 64, 1, mamba_2.MAX_CHUNK_STATES, 4)
    check_statically(*most.build_jobs()[-1], [f"sizeof(WalkMemory<{most.d_state}, false, false, false>) <= 48 << 10"])
    mixed = rwkv_6.Rwkv6Shape(2, 128, False, 2, False), rwkv_7.Rwkv7Shape(2, rwkv_7.MAX_CHUNK_HEAD, False)
    for each in mixed:
        kind = "false, true, false" if isinstance(each, rwkv_6.Rwkv6Shape) else "true, true, true"
        fits = f"sizeof(WalkMemory<{each.head}, {kind}>) <= 48 << 10"
        check_statically(*each.build_jobs()[-1], [*walk, f"2 * CHUNKED == {each.chunk_width}", fits])
    assert f"constexpr int SLAB = {matvec_plan.SLAB};" in read_file("matvec.cu")
    assert f"RUN = {moe_rows.RUN}, WAITS = {moe_rows.WAITS};" in read_file("moe_rows.cu")
    assert f"GROUP = {moe_rows.GROUP}, WARPS" in read_file("moe_rows_begin.cu")
    assert f"MAX_PAIRS = {moe_rows.MAX_ROWS * router.MAX_USED}, " in read_file("moe_rows_begin.cu")
    for file in ("moe_rows_begin.cu", "moe_rows_columns.cuh"):
        assert f"constexpr int INPUT_BYTES = {moe_rows.INPUT_BYTES}, " in read_file(file)
    for activation in set(KernelActivation) - {KernelActivation.NONE}:
        in_products = activation <= KernelActivation.SWIGLU_CLAMPED
        file, name = ("activation.cuh", "ACTIVATION") if in_products else ("rows.cu", "activation")
        assert f"{name} == {activation.value})" in read_file(file), activation


def test_a_broken_kernel_says_what_the_compiler_says():
    from engine.cuda.driver.compiler import compile_cubin
    from engine.errors import DeviceError

    with pytest.raises(DeviceError, match=r"failed to build \(broken.cu, sm_90a\)(.|\n)*undefined_name"):
        compile_cubin('extern "C" __global__ void broken() { undefined_name(); }', 90, name="broken.cu")


def test_cubins_are_cached_by_text_architecture_and_options(tmp_path, monkeypatch):
    from engine.cuda.driver import compiler

    monkeypatch.setenv("GGUF_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_cubins", {})
    source = 'extern "C" __global__ void nothing() {}'
    first = compiler.cached_cubin(source, 80)
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    monkeypatch.setattr(compiler, "_cubins", {})
    monkeypatch.setattr(compiler, "compile_cubin", None)  # a second build would fail
    assert compiler.cached_cubin(source, 80) == first
    monkeypatch.undo()
    monkeypatch.setenv("GGUF_ENGINE_CACHE", str(tmp_path))
    compiler.cached_cubin(source + " ", 80)
    compiler.cached_cubin(source, 90)
    compiler.cached_cubin(source, 80, ("-lineinfo",))
    assert len(list(tmp_path.rglob("*.cubin"))) == 4


def test_a_damaged_cubin_is_built_again_and_written(tmp_path, monkeypatch):
    """Whatever is in the file: the driver crashes on a cubin that is cut."""
    from engine.cuda.driver import compiler

    monkeypatch.setenv("GGUF_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_cubins", {})
    source = 'extern "C" __global__ void nothing_3() {}'
    cubin = compiler.cached_cubin(source, 80)
    (path,) = tmp_path.rglob("*.cubin")
    whole = path.read_bytes()
    for way, damage in [*WAYS.items(), ("an earlier version's file", lambda _: cubin)]:
        path.write_bytes(damage(whole))
        monkeypatch.setattr(compiler, "_cubins", {})
        assert compiler.cached_cubin(source, 80) == cubin, way
        assert path.read_bytes() == whole, way


def test_a_full_disk_leaves_no_partial_cubins(tmp_path, monkeypatch):
    from engine.cuda.driver import compiler

    monkeypatch.setenv("GGUF_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_cubins", {})
    fill_disk(monkeypatch, 300)
    assert compiler.cached_cubin('extern "C" __global__ void nothing_4() {}', 80)[:4] == b"\x7fELF"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


USED_OF_CUPY = {"cuda", "empty", "zeros", "asarray", "ndarray", "dtype"}
"""None of these compiles a kernel; CuPy would keep such kernels in a cache of its own, which it does not check."""


def test_cupy_compiles_nothing():
    numbers = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)}
    for path in (ROOT / "engine" / "cuda").rglob("*.py"):
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cupy"
        }
        assert used <= USED_OF_CUPY | numbers, path


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    from engine.cuda.driver import compiler

    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GGUF_ENGINE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(compiler, "_cubins", {})
    assert compiler.cached_cubin('extern "C" __global__ void nothing_2() {}', 80)[:4] == b"\x7fELF"


def test_architectures_nobody_builds_for():
    from engine.cuda.driver.compiler import best_target, target
    from engine.errors import DeviceError

    assert (target(90), target(86)) == ("sm_90a", "sm_86")
    assert best_target(89) == 89
    with pytest.raises(DeviceError, match=r"capability 7\.0; 7\.5 or newer"):
        best_target(70)
    with pytest.raises(DeviceError, match=r"does not know compute capability 99\.0: update"):
        best_target(990)
