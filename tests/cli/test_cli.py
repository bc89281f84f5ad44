"""The command line as its users run it: stdin, stdout, stderr and an exit status.

What depends on a process of its own (start-up, signals, pipes, terminals) runs in one; the rest calls main() here,
which spares a second of imports each time.
"""

import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
from typer.main import get_command

from engine import __version__
from engine.api.stream import Stream
from engine.cli.app import app
from tests.support.command_line import run
from tests.support.models.gguf_builder import tiny_llama

COMMAND = [sys.executable, "-m", "engine"]
GREEDY = ["--temp", "0", "--device", "cpu"]
START = " there was a little boy who lived in a little house in a little house"


def run_process(*arguments, stdin=None, status=0):
    """Run the command in a process of its own."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done


def error_of(*arguments, run=run, **settings):
    """The one line that a refused command writes."""
    done = run(*arguments, status=2, **settings)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    # If kernels are not compiled yet, a line says so first.
    lines = [
        line for line in done.stderr.splitlines() if not line.startswith(("loading the model", "preparing kernels"))
    ]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


class TestGenerate:
    def test_text_to_stdout_and_one_line_of_statistics(self):
        done = run_process("generate", "Once upon a time", *GREEDY, "-n", 15)
        assert done.stdout == START + "\n"
        stats = [line for line in done.stderr.splitlines() if "tok/s" in line]
        assert len(stats) == 1
        assert "load" in stats[0]
        assert "prompt 5 tokens" in stats[0]
        assert "decode 15 tokens" in stats[0]

    @pytest.mark.parametrize("flag", ["-p", "--prompt", "-f", "--prompt-ids"])
    def test_other_ways_to_give_a_prompt(self, flag, tmp_path):
        value = "Once upon a time"
        if flag == "-f":
            path = tmp_path / "prompt.txt"
            path.write_text(value)
            value = path
        elif flag == "--prompt-ids":
            import engine

            value = ",".join(map(str, engine.load_tokenizer(engine.api.llm.BUNDLED_MODEL).encode(value)))
        done = run("generate", flag, value, *GREEDY, "-n", 15, "--no-stream", "--no-stats")
        assert done.stdout == START + "\n"

    @pytest.mark.parametrize("where", [("-",), ("-f", "-")])
    def test_prompt_from_stdin_with_echo(self, where):
        done = run_process("generate", *where, *GREEDY, "-n", 15, "--echo", stdin="Once upon a time")
        assert done.stdout == "Once upon a time" + START + "\n"

    def test_a_text_without_end_is_refused(self, monkeypatch):
        monkeypatch.setattr("engine.cli.terminal.MOST_TEXT", 2 << 20)
        assert "2097152 bytes" in error_of("generate", "-f", "/dev/zero")

    def test_json(self):
        done = run("generate", "Once upon a time", *GREEDY, "-n", 4, "--json", "--logprobs", 2)
        value = json.loads(done.stdout)
        assert value["text"] == " there was a little"
        assert value["finish_reason"] == "length"
        assert len(value["token_ids"]) == len(value["logprobs"]) == 4
        assert len(value["logprobs"][0]["top_logprobs"]) == 2
        assert value["stats"]["load_seconds"] > 0
        assert value["stats"]["decode_tok_s"] > 0

    def test_seed_and_stop(self):
        first, second = (run("generate", "The king", "--seed", 5, "-n", 20, "--device", "cpu") for _ in range(2))
        assert first.stdout == second.stdout
        assert "seed 5" in first.stderr
        assert "seed 5]" not in run("generate", "The king", "--seed", -1, "-n", 1, "--device", "cpu").stderr
        stopped = run("generate", "Once upon a time", *GREEDY, "--stop", "boy", "--stop", "house")
        assert stopped.stdout == " there was a little \n"

    def test_logit_bias(self):
        done = run("generate", "Once upon a time", *GREEDY, "-n", 3, "--json", "--logit-bias", "100=1e5")
        assert json.loads(done.stdout)["token_ids"] == [100, 100, 100]

    def test_samples_under_headers(self):
        options = ["Once upon a time", "--seed", 5, "-n", 12, "--device", "cpu"]
        done = run("generate", *options, "--samples", 3)
        alone = [run("generate", *options[:2], 5 + i, *options[3:]) for i in range(3)]
        headers = [f"--- sample {i + 1} of 3, seed {5 + i}\n" for i in range(3)]
        assert done.stdout == "".join(head + one.stdout for head, one in zip(headers, alone, strict=True))
        assert "decode 36 tokens of 3 samples" in done.stderr
        assert "end: 3 length | seed 5]" in done.stderr
        value = json.loads(run("generate", *options, "--samples", 2, "--json", "--echo").stdout)
        assert [sample["text"] + "\n" for sample in value["samples"]] == [one.stdout for one in alone[:2]]
        assert value["text"] == value["samples"][0]["text"]
        assert [sample["stats"]["cached_tokens"] for sample in value["samples"]] == [0, 4]

    @pytest.mark.parametrize(
        "settings",
        [
            ["--no-prefix-cache"],
            ["--max-sequences", 2, "--cache-tokens", 64, "-c", 64],
            ["--prefill-chunk", 2, "--deterministic"],
            ["--checkpoint-spacing", 128, "--checkpoints", 0],
        ],
    )
    def test_how_it_is_batched_changes_no_text(self, settings):
        options = ["Once upon a time", "--seed", 5, "-n", 8, "--device", "cpu", "--samples", 3]
        assert run("generate", *options, *settings).stdout == run("generate", *options).stdout

    def test_interrupt_keeps_what_there_is_of_every_sample(self):
        fetch, calls = Stream.__next__, itertools.count()

        def interrupted(stream):
            if next(calls) == 10:
                raise KeyboardInterrupt
            return fetch(stream)

        options = ["--samples", 3, "-n", "-1", "--ignore-eos", "--device", "cpu", "--json"]
        with mock.patch.object(Stream, "__next__", interrupted):
            done = run("generate", "Once upon a time", *options, status=130)
        lengths = [len(sample["token_ids"]) for sample in json.loads(done.stdout)["samples"]]
        assert lengths[0] == 10
        assert min(lengths) > 0
        assert "end: 3 cancelled" in done.stderr

    def test_model_without_tokenizer(self, tmp_path):
        path = tmp_path / "bare.gguf"
        path.write_bytes(tiny_llama(tokenizer=False))
        done = run("generate", "-m", path, "--prompt-ids", "1 2 3", *GREEDY, "-n", 4)
        assert len(done.stdout.split()) == 4
        assert "token ids" in error_of("generate", "-m", path, "text")

    def test_interrupt_while_starting_is_quiet(self):
        """Wherever in the imports and the loading it arrives, once Python itself has started."""
        for delay in (0.03, 0.1, 0.3):
            process = subprocess.Popen(
                [sys.executable, "-c", "from engine.cli import main; print(flush=True); main()", "generate", "Once"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert "Traceback" not in errors
            assert process.returncode == 130

    def test_interrupt_keeps_what_there_is(self):
        process = subprocess.Popen(
            [*COMMAND, "generate", "Once upon a time", *GREEDY, "-n", "-1", "--ignore-eos"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begin = process.stdout.read(len(START))
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert begin == START
        assert rest.endswith("\n")
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert "end: cancelled" in errors

    def test_closed_pipe_is_quiet(self):
        process = subprocess.Popen(
            [*COMMAND, "generate", "Once upon a time", *GREEDY, "-n", "200"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdout.read(4)
        process.stdout.close()
        errors = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) != 0
        assert "Traceback" not in errors
        assert "BrokenPipe" not in errors

    def test_an_interrupt_that_python_swallows_is_not_lost(self):
        """Raised inside a finalizer, as it happens while kernels are loaded, it would be printed and forgotten."""
        code = (
            "import signal, sys, engine.api.llm\n"
            "class Finalized:\n"
            "    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
            "opening = engine.api.llm.open_gguf\n"
            "def opened(path):\n"
            "    Finalized()\n"
            "    return opening(path)\n"
            "engine.api.llm.open_gguf = opened\n"
            "from engine.cli import main\n"
            "main()"
        )
        command = [sys.executable, "-c", code, "generate", "Once", "-n", "1", "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (130, "")
        assert "KeyboardInterrupt" not in done.stderr

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
    def test_streams_that_the_caller_closed(self, closed):
        command = f"exec {sys.executable} -m engine generate -f - -n 4 --temp 0 --device cpu {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, input="Once upon", timeout=60)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr

    def test_a_cache_beyond_all_memory(self):
        done = run("generate", "a", "--device", "cpu", "-c", 10**11, status=2)
        assert "GiB: ask for a smaller context_length" in done.stderr.splitlines()[-1]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["generate"], "no prompt"),
            (["generate", "a", "-p", "b"], "2 prompts"),
            (["generate", "a", "--no-such-option"], "--no-such-option"),
            (["generate", "a", "--top-p", "3"], "top_p is 3"),
            (["generate", "a", "--seed", "-2"], "seed is -2"),
            (["generate", "a", "--samples", "0"], "--samples"),
            (["generate", "a", "--max-sequences", "0"], "max_sequences is 0"),
            (["generate", "a", "--cache-tokens", "10", "-c", "20"], "one whole context of 20"),
            (["generate", "a", "--cache-tokens", "10", "--device", "cpu"], "one whole context of 1024"),
            (["generate", "a", "--prefill-chunk", "-1"], "prefill_chunk is -1"),
            (["bench", "--sequences", "1,x"], "1,4,16"),
            (["bench", "--sequences", "1,3000"], "1 to 1024"),
            (["generate", "a", "--stop", ""], "at least one character"),
            (["generate", "--prompt-ids", "1,x"], "1,15,27"),
            (["generate", "--prompt-ids", "4096", "--device", "cpu"], "0 to 4095"),
            (["generate", "a", "-n", "x"], "--max-tokens"),
            (["generate", "a", "-n", "-2"], "--max-tokens"),
            (["generate", "a", "-n", "100000", "--device", "cpu"], "context of 1024"),
            (["generate", "a", "-m", "/no/such/file.gguf"], "/no/such/file.gguf"),
            (["generate", "a", "--device", "tpu"], "tpu"),
            (["generate", "a", "--kv-type", "q1"], "f16, f32, q8_0"),
            (["generate", "a", "--logit-bias", "nonsense"], "ID=BIAS"),
            (["generate", "-f", "/no/such/prompt.txt"], "/no/such/prompt.txt"),
            (["chat", "--device", "cpu"], "no chat template"),
            (["perplexity"], "text file"),
            (["perplexity", "/no/such/text"], "/no/such/text"),
            (["inspect", "/no/such/file.gguf"], "/no/such/file.gguf"),
            (["nonsense"], "nonsense"),
            (["generate", "abc\udcff"], "prompt is not UTF-8 text: byte 3 is 0xff"),
            (["generate", "a", "--stop", "b", "--stop", "\udcff"], "stop is not UTF-8"),
            (["embed", "a", "\udcc3"], "texts is not UTF-8"),
        ],
    )
    def test_one_clear_line(self, arguments, words):
        assert words in error_of(*arguments)

    def test_arguments_are_utf8_whatever_the_locale_decodes(self):
        """With the locale C and no UTF-8 mode Python gives the bytes of an umlaut as two surrogates."""
        done = [run("generate", text, "-n", 3, "--temp", 0, "--json") for text in ("für", "f\udcc3\udcbcr")]
        plain, escaped = (json.loads(one.stdout)["prompt_token_ids"] for one in done)
        assert plain == escaped

    def test_an_error_without_a_file_has_no_number(self, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("engine.cli.commands.generate.write", full)
        assert error_of("generate", "a", "-n", 1).splitlines()[-1] == "error: No space left on device"

    def test_a_file_that_is_no_model(self, tmp_path):
        path = tmp_path / "x.gguf"
        for data in (b"this is not a model at all", b""):
            path.write_bytes(data)
            assert str(path) in error_of("generate", "a", "-m", path)
        assert str(tmp_path) in error_of("generate", "a", "-m", tmp_path)

    def test_in_a_process_of_its_own(self):
        assert "top_p is 3" in error_of("generate", "a", "--top-p", 3, run=run_process)
        assert "no chat template" in error_of("chat", "--device", "cpu", run=run_process)

    def test_no_command_shows_the_help_and_no_error(self):
        done = run(status=2)
        assert "perplexity" in done.stdout + done.stderr
        assert "error" not in done.stderr

    def test_debug_shows_the_traceback(self):
        done = run_process("generate", "a", "--top-p", "3", "--debug", status=1)
        assert "Traceback" in done.stderr
        assert "top_p is 3" in done.stderr


class TestChat:
    TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"

    @pytest.fixture
    def template(self, tmp_path):
        path = tmp_path / "template.jinja"
        path.write_text(self.TEMPLATE)
        return path

    def test_piped_conversation(self, template):
        options = ["--chat-template-file", template, *GREEDY, "-n", 8, "--stats"]
        done = run_process("chat", *options, stdin="Hello\n\n/help\nAgain\n/reset\nHello\n/exit\nnever\n")
        counts = [int(line.split("prompt ")[1].split()[0]) for line in done.stderr.splitlines() if "tok/s" in line]
        assert len(counts) == 3
        assert counts[1] > counts[0] + 8  # the second prompt contains the first question and its answer
        assert counts[2] == counts[0]
        assert "tokens (" in done.stderr.splitlines()[-1]  # it was read before: only its last token is computed
        assert "forgotten" in done.stderr

    def test_a_broken_template_is_told_at_once(self, tmp_path):
        path = tmp_path / "broken.jinja"
        for source, words in ((b"{% for", "does not parse, line 1"), (b"\xff", "not UTF-8")):
            path.write_bytes(source)
            assert words in error_of("chat", "--chat-template-file", path, "--device", "cpu")

    def test_end_of_input_ends_it(self, template):
        assert run("chat", "--chat-template-file", template, *GREEDY, stdin="").stdout == ""

    def test_interrupt_stops_the_answer_and_not_the_program(self, template):
        """On a terminal: Ctrl-C while the answer comes, then another question, then /exit."""
        main, terminal = pty.openpty()
        command = [*COMMAND, "chat", "--chat-template-file", str(template), "--stats", "--temp", "0", "--device", "cpu"]
        process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
        os.close(terminal)
        seen = ""

        def read_until(words):
            nonlocal seen
            while words not in seen:
                assert select.select([main], [], [], 60)[0], f"no {words!r} in {seen!r}"
                seen += os.read(main, 4096).decode("utf-8", "replace")

        try:
            read_until("> ")
            os.write(main, b"Once upon a time\n")
            read_until("time\r\n")
            seen = ""
            read_until(" ")  # the answer has begun
            process.send_signal(signal.SIGINT)
            read_until("end: cancelled")
            seen = ""
            os.write(main, b"/reset\n")
            read_until("forgotten")
            os.write(main, b"/exit\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            os.close(main)
        assert "Traceback" not in seen


class TestInspect:
    def test_json(self):
        value = json.loads(run("inspect", "--json", "--device", "cpu", "-c", 512, "--tensors").stdout)
        assert value["metadata"]["general.architecture"] == "llama"
        assert value["metadata"]["tokenizer.ggml.tokens"]["length"] == 4096
        assert value["tensors"] == len(value["tensor_list"]) == 56
        assert sum(row["bytes"] for row in value["types"]) == sum(row["bytes"] for row in value["tensor_list"])
        memory = value["memory"]
        assert (memory["context_length"], memory["kv_bytes"]) == (512, 512 * 6 * 2 * 4 * 64 * 2)
        parts = ("weights_bytes", "repacked_bytes", "kv_bytes", "state_bytes", "scratch_bytes")
        assert memory["total_bytes"] == sum(memory[part] for part in parts)

    def test_text(self):
        text = run("inspect", "--device", "cpu", "--activation-bits", 16).stdout
        for words in ("tales 16M", "Q4_K", "Q6_K", "4096 items", "context 1024", "total", "activations: 16 bits"):
            assert words in text
        assert "activations" not in run("inspect", "--device", "cpu", "--exact").stdout

    def test_unknown_architecture_has_no_memory_plan(self, tmp_path):
        path = tmp_path / "other.gguf"
        path.write_bytes(tiny_llama(architecture="telepathy"))
        assert "telepathy" in json.loads(run("inspect", path, "--json").stdout)["memory"]["error"]


class TestBenchAndPerplexity:
    def test_bench_json(self):
        options = ["--prompt-tokens", 20, "--gen-tokens", 6, "--depth", 8, "--batch", 2, "--repetitions", 2]
        value = json.loads(run("bench", "--device", "cpu", *options, "--json").stdout)
        for key in ("prompt_tok_s", "decode_tok_s", "load_seconds", "decode_gb_s", "bandwidth_gb_s"):
            assert value[key] > 0, key
        low, high = value["decode_tok_s_range"]
        assert low <= value["decode_tok_s"] <= high
        assert 0 < value["bandwidth_percent"] < 150
        assert value["device"] == "cpu"
        assert value["model"].endswith("tales-Q4_K_M.gguf")

    def test_bench_of_several_numbers_of_sequences(self):
        options = ["--device", "cpu", "-p", 8, "-n", 70, "-r", 1, "--sequences", "1,3"]
        lines = run("bench", *options, "--json").stdout.splitlines()
        assert [json.loads(line)["batch"] for line in lines] == [1, 3]
        text = run("bench", *options).stdout
        assert "\n1 sequence, " in text
        assert "\n3 sequences, " in text

    def test_bench_text_and_refusal(self):
        text = run("bench", "--device", "cpu", "-p", 8, "-n", 0, "-r", 1).stdout
        assert "prompt      8 tokens" in text
        assert "decode" not in text.splitlines()[-1]
        assert "both lengths 0" in error_of("bench", "--device", "cpu", "-p", 0, "-n", 0)
        assert "needs a GPU" in error_of("bench", "--device", "cpu", "--profile")

    def test_perplexity(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("Once upon a time there was a little boy who lived in a little house. " * 20)
        options = [path, "-c", 64, "--chunks", 3, "--device", "cpu"]
        value = json.loads(run("perplexity", *options, "--json").stdout)
        assert (value["chunks"], value["tokens"]) == (3, 3 * 31)
        text = run("perplexity", *options).stdout
        assert text.startswith(f"perplexity {value['perplexity']:.4f} +/- ")


class TestStart:
    def test_import_is_light(self):
        code = (
            "import sys, engine; print([m for m in ('numpy', 'numba', 'cupy', 'typer', 'jinja2') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_help_loads_no_numerics(self):
        code = (
            "import sys; sys.argv = ['gguf-engine', '--help']\n"
            "from engine.cli import main\n"
            "try: main()\n"
            "finally: print([m for m in ('numpy', 'numba', 'jinja2') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("[]")
        for command in ("generate", "chat", "inspect", "bench", "perplexity"):
            assert command in done.stdout

    @pytest.mark.parametrize("command", ["generate", "chat", "inspect", "bench", "perplexity"])
    def test_every_command_has_help(self, command):
        assert "--model" in run(command, "--help").stdout

    @pytest.mark.parametrize("columns", [40, 80])
    def test_no_name_of_an_option_is_cut(self, columns):
        for name, command in get_command(app).commands.items():
            lines = run(name, "--help", columns=columns).stdout.splitlines()
            assert max(map(len, lines)) <= columns
            assert "…" not in "".join(lines)
            words = {word.strip(",") for line in lines for word in line.split()}
            for parameter in command.params:
                if parameter.param_type_name == "option":
                    assert {*parameter.opts, *parameter.secondary_opts} <= words

    def test_help_tells_what_is_taken_without_an_option(self):
        text = run("generate", "--help").stdout
        for default in ("the bundled model", "256", "the physical cores", "random", "0.95"):
            assert f"{default})" in text or f"default: {default}]" in text, default

    def test_version(self):
        assert run_process("--version").stdout == f"gguf-engine {__version__}\n"
