"""The command line as a user meets it: output, exit codes, signals, and what it says when something is missing.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pagedattn
import pytest
from pagedattn._cli import app
from pagedattn._cli.shared import check_writable
from pagedattn._device import choose_backend
from typer.testing import CliRunner

SMALL = ["--layers", "1", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--num-blocks", "64"]
QUICK = [*SMALL, "--requests", "4", "--length-scale", "0.1"]


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def pagedattn_command(*args: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagedattn", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_replay_without_a_trace_reports_and_exits_with_0():
    done = pagedattn_command("replay", *QUICK)
    assert done.returncode == 0, done.stderr
    for name in (
        "4 of 4 completed",
        "prompt tokens",
        "generated tokens",
        "steps",
        "tokens/s",
        "attention",
        "cache writes",
        "block manager",
        "the rest",
        "KV read by attention",
        "GB/s",
        "waste, paged",
        "waste, contiguous at final length",
        "waste, contiguous at maximum length",
        "prefix-hit tokens",
        "copy-on-write copies",
        "preemptions",
        "peak in use",
        "rows verified",
        "largest error",
    ):
        assert name in done.stdout
    # Plain text where nobody sees colours, and the choice of backend told aside.
    assert "\x1b" not in done.stdout + done.stderr
    assert "backend" in done.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--length-scale", "1e18"], "more than"),
        (["--length-scale", "1e300"], "more than"),
        (["--num-blocks", "1"], "no request was completed"),
    ],
)
def test_what_is_no_wrong_result_exits_with_2_and_a_line(options: list[str], complaint: str):
    done = pagedattn_command("replay", *QUICK, *options)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_json_is_the_report_alone():
    done = pagedattn_command("replay", *QUICK, "--json", "--verify", "3")
    report = json.loads(done.stdout)
    assert report["completed"] == report["requests"] == 4
    assert report["settings"]["heads"] == 2
    assert report["rows_verified"] == 3 * report["steps"]
    assert report["mismatch"] is None
    assert sum(report["seconds_by_part"].values()) == pytest.approx(report["seconds"], rel=0.01)
    assert set(report["seconds_by_part"]) >= {"attention", "cache writes", "block manager", "the rest"}
    for field in ("kv_gigabytes_per_second", "tokens_per_second", "waste_paged", "waste_at_max_length", "hit_rate"):
        assert report[field] >= 0


def test_a_file_that_was_tried_is_not_left_behind(tmp_path: Path):
    new, old = tmp_path / "new.svg", tmp_path / "old.svg"
    old.write_text("as it was")
    link = tmp_path / "link.svg"
    link.symlink_to(new)
    for path in (new, old, link, Path("/dev/stdout"), None):
        check_writable("--svg", path)
    assert not new.exists()
    assert link.is_symlink()
    assert old.read_text() == "as it was"


def test_both_trace_formats_run(tmp_path: Path):
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text(
        '{"timestamp": 0, "input_length": 1500, "output_length": 40, "hash_ids": [0, 1, 2]}\n'
        '{"timestamp": 9, "input_length": 1400, "output_length": 40, "hash_ids": [0, 1, 3]}\n'
    )
    azure = tmp_path / "a.csv"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023,396,109\n")
    options = [*SMALL, "--length-scale", "0.1", "--max-batch", "1", "--json"]
    reports = [json.loads(CliRunner().invoke(app, ["replay", str(p), *options]).stdout) for p in (mooncake, azure)]
    assert [r["completed"] for r in reports] == [2, 2]
    assert [r["prompt_tokens"] for r in reports] == [150 + 140, 37 + 40]
    # 512 tokens scaled to 52: the two share 104 tokens, six blocks of 16 and half of another.
    assert [r["hit_tokens"] for r in reports] == [104, 0]


def test_svg_draws_the_cache_at_its_fullest(tmp_path: Path):
    picture = tmp_path / "cache.svg"
    done = CliRunner().invoke(app, ["replay", *QUICK, "--svg", str(picture)])
    assert done.exit_code == 0, done.output
    root = ET.parse(picture).getroot()
    assert root.tag.endswith("svg")
    assert "blocks in use" in "".join(root.itertext())


def test_svg_may_go_to_standard_output():
    done = pagedattn_command("replay", *QUICK, "--svg", "/dev/stdout")
    assert done.returncode == 0, done.stderr
    assert "</svg>" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dtype", "int8"], "replay: --dtype must be one of float32, float16, bfloat16; got int8"),
        (["--heads", "6", "--kv-heads", "4"], "replay: --heads must be a multiple of --kv-heads; got 6 and 4"),
        (["--memory", "lots"], "replay: --memory must be a size such as 512MiB or 2GB; got lots"),
        (["--requests", "0"], "replay: --requests must be from 1 to 100000000; got 0"),
        (
            ["--requests", "9223372036854775807"],
            "replay: --requests must be from 1 to 100000000; got 92233720368547758",
        ),
        (["nowhere.jsonl", "--requests", "9" * 20], "replay: --requests must be from 1 to 100000000; got 999999999999"),
        (["--verify", "9" * 20], "replay: --verify must be at most 1000000; got 99999999999999999999"),
        (["--svg", "cache.png"], "replay: --svg must name a file that ends in .svg; got cache.png"),
        (["--length-scale", "nan"], "replay: --length-scale must be a positive number; got nan"),
        (["--backend", "abacus"], "replay: --backend must be auto, cpu or cuda; got abacus"),
        (["--num-blocks", "1000000000000"], "replay: --num-blocks must be at most 2147483647"),
        (["--num-blocks", "2000000000"], "are free: give a smaller --num-blocks"),
        (["--svg", "/nowhere/at/all.svg"], "replay: --svg must name a file in a directory that exists"),
        (["--svg", "/proc/cache.svg"], "replay: --svg must name a file that can be written; got /proc/cache.svg"),
        (["nowhere.jsonl"], "replay: nowhere.jsonl: No such file or directory"),
        (["--layers", "many"], "--layers"),
    ],
)
def test_a_wrong_option_is_named_in_a_line_and_exits_with_2(args, message):
    done = CliRunner().invoke(app, ["replay", *args])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_a_malformed_trace_is_named_with_its_line_and_exits_with_2(tmp_path: Path):
    trace = tmp_path / "bad.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,5,3\n0,-1,3\n")
    done = CliRunner().invoke(app, ["replay", str(trace)])
    assert done.exit_code == 2
    assert f"{trace}, line 3: ContextTokens must be a whole number" in done.stderr


@pytest.mark.skipif("cuda" in pagedattn.config()["backends"], reason="this build has CUDA kernels")
def test_cuda_without_a_cuda_build_says_so():
    done = CliRunner().invoke(app, ["replay", "--backend", "cuda"])
    assert done.exit_code == 2
    assert "replay: --backend cuda: this build of pagedattn has no CUDA kernels" in done.stderr


FAULTY = """
import sys
import pagedattn
attend = pagedattn.paged_attention
def faulty(q, k_cache, v_cache, tables, *args, **options):
    tables = tables.copy()
    tables[:, 0] = tables[::-1, 0]
    return attend(q, k_cache, v_cache, tables, *args, **options)
pagedattn.paged_attention = faulty
from pagedattn.__main__ import main
main()
"""


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_wrong_result_exits_with_1_and_names_the_place(extra):
    done = python(FAULTY, "replay", *QUICK, "--verify", "20", *extra)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    for part in ("wrong result in step", "request", "sequence", "position", "layer 0", "head", "relative error"):
        assert part in message
    # The report of what was done until then still comes.
    assert (json.loads(done.stdout)["mismatch"]["layer"] == 0) if extra else ("rows verified" in done.stdout)


INTERRUPTED = """
import os
import sys
import pagedattn
attend = pagedattn.paged_attention
calls = 0
def interrupting(*args, **options):
    global calls
    calls += 1
    if calls == 5:
        os.kill(os.getpid(), {number})
    return attend(*args, **options)
pagedattn.paged_attention = interrupting
from pagedattn.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_replay_with_the_report_so_far(number):
    done = python(INTERRUPTED.format(number=int(number)), "replay", *SMALL, "--requests", "40", "--json")
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert report["interrupted"] is True
    # One layer, so a call a step; the step in which the signal came is finished.
    assert report["steps"] == 5
    assert report["completed"] < 40


def test_ctrl_c_is_obeyed_from_outside():
    command = [sys.executable, "-m", "pagedattn", "replay", *SMALL, "--requests", "20000"]

    def obey() -> None:
        # Tests that run in the background of a script inherit that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=obey
    ) as process:
        # The line is printed when the trace is ready; the run takes minutes from there.
        assert process.stderr is not None
        assert "20000 requests" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "of 20000 completed" in out or "stopped" in err


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, {handler})
sys.meta_path.insert(0, Interrupting())
from pagedattn.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["pagedattn._cli", "typer", "rich"])
def test_ctrl_c_while_modules_are_imported_ends_the_command_without_a_word(module: str):
    done = python(INTERRUPTED_IMPORT.format(module=module, handler="signal.default_int_handler"), "info")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_the_options_are_put_together_ends_the_command_without_a_word():
    code = """
import os, signal
import typer.main
typer.main.get_command = lambda app: os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
from pagedattn.__main__ import main
main()
"""
    done = python(code, "info")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_where_ctrl_c_is_ignored_it_is_while_modules_are_imported():
    done = python(INTERRUPTED_IMPORT.format(module="typer", handler="signal.SIG_IGN"), "--version")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["info", "replay", "--version"])
def test_without_standard_output_a_line_says_so(command: str):
    closed = ["sh", "-c", '"$0" -m pagedattn "$1" >&-', sys.executable, command]
    done = subprocess.run(closed, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == "pagedattn: standard output is closed; >/dev/null discards it\n"


def test_a_terminal_gets_live_progress_and_a_table():
    parent, child = pty.openpty()
    # A dumb or unknown terminal would be treated as none.
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-m", "pagedattn", "replay", *SMALL, "--requests", "12", "--length-scale", "0.3"]
    process = subprocess.Popen(command, stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(parent)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "\x1b[" in text
    for part in ("/12", "tokens/s", "blocks", "% prefix hits", "12 of 12 completed", "largest error"):
        assert part in text


def test_info_says_what_was_built():
    done = pagedattn_command("info")
    assert done.returncode == 0, done.stderr
    facts = json.loads(pagedattn_command("info", "--json").stdout)
    assert facts == json.loads(json.dumps(pagedattn.config()))
    assert facts["version"] in done.stdout
    assert facts["cpu"]["isa"] in done.stdout
    for operation, _, kernel in facts["kernels"]:
        assert operation in done.stdout
        assert kernel in done.stdout


NO_DRIVER = "no CUDA driver was found (libcuda.so.1 is missing)"


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ({"devices": [], "no_device_because": f"{NO_DRIVER}; install one"}, NO_DRIVER),
        ({"devices": [], "no_device_because": None}, "no CUDA device was found"),
        ({"devices": [{}], "no_device_because": None}, "CuPy cannot be imported"),
    ],
)
def test_cupy_is_asked_for_only_where_there_is_a_gpu(devices, reason, monkeypatch):
    monkeypatch.setattr(pagedattn, "config", lambda: {"cuda": {"built": True, **devices}})
    monkeypatch.setitem(sys.modules, "cupy", None)
    backend, why = choose_backend("auto")
    assert backend == "cpu"
    assert why.startswith(reason)
    assert "install one" not in why


def test_info_works_without_cupy():
    hide = "import sys; sys.modules['cupy'] = None; from pagedattn.__main__ import main; main()"
    done = python(hide, "info")
    assert done.returncode == 0, done.stderr


def test_a_variable_that_cannot_be_is_told_in_a_line():
    done = pagedattn_command("info", env={**os.environ, "PAGEDATTN_CPU_ISA": "abacus"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("info: ")
    assert "`PAGEDATTN_CPU_ISA` must be one of generic," in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["info", "replay"])
def test_a_number_of_threads_that_is_none_is_told_in_a_line(command: str):
    done = pagedattn_command(command, env={**os.environ, "PAGEDATTN_NUM_THREADS": "abc"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"{command}: ")
    assert "`PAGEDATTN_NUM_THREADS` must be a number of threads, 1 to 4096; got `abc`" in done.stderr


def test_whether_to_print_json_is_a_truth_value():
    with pytest.raises(pagedattn.InvalidArgumentError, match="show_config: `as_json` must be True or False; got 'yes'"):
        pagedattn.show_config(as_json="yes")


def test_a_report_survives_a_locale_without_its_letters():
    done = pagedattn_command("bench", "--quick", "--lengths", "8", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "of ceiling" in done.stdout


def test_the_version_is_told():
    assert pagedattn_command("--version").stdout == f"pagedattn {pagedattn.__version__}\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra_one_line_says_how_to_get_it(missing):
    hide = f"import sys; sys.modules[{missing!r}] = None; from pagedattn.__main__ import main; main()"
    done = python(hide, "info")
    assert done.returncode == 1
    assert done.stderr == f"pagedattn: the command line needs {missing}: pip install 'pagedattn[cli]'\n"


OPTIONS = """backend dtype kv-dtype layers heads kv-heads head-dim block-size num-blocks memory max-batch chunk
requests length-scale seed verify json svg"""


def test_help_names_every_command_and_option():
    commands = pagedattn_command("--help").stdout
    assert "replay" in commands
    assert "info" in commands
    assert "..." not in commands.partition("Commands:")[2]  # nothing is cut off
    assert pagedattn_command("-h").stdout == commands
    text = pagedattn_command("replay", "--help").stdout
    missing = [option for option in OPTIONS.split() if f"--{option} " not in text]
    assert not missing
