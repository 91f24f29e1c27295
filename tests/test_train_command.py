"""Training from the command line: what it writes, that any stop loses nothing, and what it says of what can't be."""

import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt as bptt
from jaxbptt import plots, tasks, words
from jaxbptt.__main__ import _parser, main
from jaxbptt.commands import cluster, compiled, memory, metrics, optimizers, sources
from jaxbptt.commands import options as train_options
from jaxbptt.tasks import mapped
from jaxbptt.training import checkpoints, chunks

TEXT = "the quick brown fox jumps over the lazy dog; ¿qué? " * 6
SMALL = ["--hidden", "6", "--steps", "10", "--batch", "2", "--save-every", "6", "--sample", "0"]
# Epochs are of 15 updates: runs of 24 go through the data more than once, and stop in the middle of it.
TEXT_RUN = [*SMALL, "--text", "data.txt", "--seed", "3"]
ARRAY_RUN = [*SMALL, "--npz", "data.npy", "--cell", "gru", "--layers", "2", "--metrics", "m.jsonl"]


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text(TEXT, encoding="utf-8")
    waves = 5 + np.sin(np.arange(240)[:, None] * [0.3, 0.5]) * [1, 100]
    np.save("data.npy", waves)
    np.savez("data.npz", waves)
    np.savetxt("data.csv", waves, delimiter=",")
    jax.devices()  # so that no test changes how many there are
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam promotes
        yield


def train(*arguments):
    return main(["train", *arguments])


def opened(*arguments):
    """The options and the source of a run."""
    options = _parser().parse_args(["train", *arguments])
    options.arguments = ("train", *arguments)
    train_options.complete(options)
    return options, sources.open_source(options)


@functools.cache
def in_one_go():
    """24 updates of `TEXT_RUN` without a stop, what others are compared with: run once for all of them."""
    assert train(*TEXT_RUN, "--checkpoints", "once", "--updates", "24") == 0
    return {"metrics": Path("once/metrics.csv").read_bytes(), "state": state_of("once")}


def state_of(folder):
    """The newest checkpoint: its step, and leaves by name."""
    return {"step": checkpoints.latest(folder)} | checkpoints.read(folder)


def assert_same(ours, theirs):
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes(), name


def process(*arguments, **environment):
    """A run as its own process; it shares the flags of this one, for the same compiled code."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxbptt", "train", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_text_is_learnt(capsys):
    assert train(*TEXT_RUN, "--updates", "60", "--learning-rate", "0.03", "--sample", "20") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    characters, size = len(TEXT), len(TEXT.encode())
    assert (
        f"data.txt: {size:,} bytes (33 different, {characters:,} characters); the last {round(size / 10)}"
        in printed.out
    )
    assert "lstm, hidden size 6, 1 layer, " in printed.out
    assert re.search(
        r"update 60: \d\.\d+, validation \d\.\d+ bits per character, \d+\.\d updates/s, 0:00 left", printed.out
    )
    assert re.search(r"A sample.*\n.{10,}", printed.out)
    assert sorted(path.name for path in Path("jaxbptt-train").iterdir()) == [
        "best",
        "learning-curve.png",
        "metrics.csv",
        *(f"step_{step:08d}" for step in (48, 54, 60)),
    ]
    assert Path("jaxbptt-train/learning-curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = metrics.read(Path("jaxbptt-train/metrics.csv"))
    assert [row["update"] for row in rows] == list(range(1, 61))
    assert [row["update"] for row in rows if "validation_loss" in row] == list(range(6, 61, 6))
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    for row in rows:
        np.testing.assert_allclose(row["bits_per_character"], row["loss"] / np.log(2) * size / characters, rtol=1e-6)
    assert {"gradient_norm", "fraction_clipped", "carry_norm"} <= rows[0].keys()


def test_numbers_are_forecast(capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        plots, "plot_learning_curve", lambda *a, **k: drawn.append((a, k)) or plots.figure.new_figure(1, width=2)[0]
    )
    losses = {}
    for file, ending in (("csv", "csv"), ("npy", "jsonl")):
        source = ["--npz" if file != "csv" else "--csv", f"data.{file}", "--metrics", f"{file}.{ending}"]
        assert (
            train(*SMALL, *source, "--checkpoints", file, "--figure", "curve.svg", "--updates", "8", "--cell", "elman")
            == 0
        )
        losses[file] = [row["loss"] for row in metrics.read(Path(f"{file}.{ending}"))]
    printed = capsys.readouterr().out
    assert "240 rows of 2 numbers, standardised by the training data; the last 24 are for validation" in printed
    assert "mean squared error, standardised" in printed
    assert "A sample" not in printed
    np.testing.assert_allclose(losses["csv"], losses["npy"], rtol=1e-4)
    columns = "update,loss,gradient_norm,fraction_clipped,carry_norm,validation_loss"
    assert Path("csv.csv").read_text().splitlines()[0] == columns
    assert train(*SMALL, "--csv", "data.csv", "--metrics", "csv.csv", "--checkpoints", "x") == 2
    assert "csv.csv already holds the metrics of another run" in capsys.readouterr().err
    assert Path("curve.svg").read_text().startswith("<?xml")
    (training, validation), words = drawn[-1]
    assert training == (list(range(1, 9)), losses["npy"])
    assert validation[0] == [6, 8]
    assert words == {"measure": "mean squared error, standardised"}


def test_only_the_training_data_standardises():
    values = np.arange(100.0)
    np.save("line.npy", values)
    _, source = opened("--npz", "line.npy", "--batch", "2", "--steps", "5", "--validation", "0.2")
    chunk = source.training.at(0)
    mean, deviation = values[:80].mean(), values[:80].std()
    np.testing.assert_allclose(chunk.xs[:, 0, 0], (values[:5] - mean) / deviation, rtol=1e-5)
    assert chunk.xs.dtype == np.float32
    assert chunk.xs.shape == (5, 2, 1)
    np.testing.assert_allclose(source.validation.at(0).targets[0, 0, 0], (81 - mean) / deviation, rtol=1e-5)
    archive, array = (opened(*SMALL, "--npz", f"data.{ending}")[1] for ending in ("npz", "npy"))
    np.testing.assert_allclose(archive.training.at(2).xs, array.training.at(2).xs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_resumed_is_the_same_bit_for_bit():
    """Also where the metrics' file has gone on after the checkpoint, down to half a line."""
    once = in_one_go()
    file = Path("twice/metrics.csv")
    assert train(*TEXT_RUN, "--checkpoints", "twice", "--updates", "12") == 0
    assert checkpoints.latest("twice") == 12
    with file.open("a") as lines:
        lines.writelines(once["metrics"].decode().splitlines(keepends=True)[13:15])
        lines.write("15,4.")
    assert train("--resume", "twice", "--updates", "24") == 0
    assert_same(state_of("twice"), once["state"])
    assert file.read_bytes() == once["metrics"]
    assert len(once["metrics"].splitlines()) == 25


@pytest.mark.slow
def test_resumed_with_a_schedule_and_layers(monkeypatch, capsys):
    """The rate's schedule goes on where it was, and so do JSON lines; here the stop is no multiple of --save-every."""
    arguments = [*ARRAY_RUN, "--schedule", "cosine", "--updates", "24"]
    assert train(*arguments, "--checkpoints", "once") == 0
    whole = Path("m.jsonl").read_bytes()
    assert train(*arguments, "--checkpoints", "twice") == 2
    assert "--metrics m.jsonl already holds the metrics of another run: name another file." in capsys.readouterr().err
    Path("m.jsonl").unlink()
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert train(*arguments, "--checkpoints", "twice") == 130
    with Path("m.jsonl").open("a") as lines:
        lines.write('{"update": 10, "loss": 1')
    assert train("--resume", "twice", "--minutes", "10") == 0
    assert_same(state_of("twice"), state_of("once"))
    assert_same(state_of("twice/best"), state_of("once/best"))
    assert Path("m.jsonl").read_bytes() == whole
    assert [json.loads(line)["update"] for line in whole.splitlines()] == list(range(1, 25))


def stop_at(monkeypatch, position, number=signal.SIGINT):
    """Ctrl-C while the update after so many others is prepared."""
    step = chunks.StreamIterator.__next__

    def next_or_stop(iterator):
        if iterator.position == position - 1:
            signal.raise_signal(number)
        return step(iterator)

    monkeypatch.setattr(chunks.StreamIterator, "__next__", next_or_stop)


def test_ctrl_c_saves_and_says_how_to_resume(monkeypatch, capsys):
    arguments = [*TEXT_RUN, "--updates", "24", "--metrics", "a b.csv"]
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert train(*arguments) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Stopped and saved at update 9. To resume:" in printed.out
    command = shlex.split(printed.out.strip().splitlines()[-1])
    assert command[1:4] == ["-m", "jaxbptt", "train"]
    assert command[4:] == ["--resume", "jaxbptt-train"]
    assert train(*command[4:]) == 0
    assert_same(state_of("jaxbptt-train"), in_one_go()["state"])
    assert Path("a b.csv").read_bytes() == in_one_go()["metrics"]


def test_a_launcher_that_ends_the_job_is_heard(monkeypatch, capsys):
    stop_at(monkeypatch, 1, signal.SIGTERM)
    assert train(*TEXT_RUN) == 143
    assert "Stopped and saved at update 1." in capsys.readouterr().out


def test_ctrl_c_before_the_first_update(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "open_source", interrupt)
    assert train(*TEXT_RUN) == 130
    assert "interrupted, nothing saved" in capsys.readouterr().err
    assert not Path("jaxbptt-train").exists()


KILLED = """
import os, signal, sys
def hook(event, arguments):
    # Python reports every file that it opens or renames before it does.
    if event == {event!r} and "train/step_00000012.saving" in str(arguments[0]) and str(arguments[{which}]).endswith({end!r}):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from jaxbptt.__main__ import main
main(["train", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("event", "which", "end"),
    [("open", 0, "record.json"), ("os.rename", 1, "step_00000012")],
    ids=["writing", "naming"],
)
@pytest.mark.costly
def test_a_kill_in_the_middle_of_a_save(event, which, end):
    """SIGKILL while the second checkpoint is written: the first is there, and going on gives what would have been."""
    arguments = [*TEXT_RUN, "--updates", "24"]
    code = KILLED.format(event=event, which=which, end=end)
    killed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = sorted(path.name for path in Path("jaxbptt-train").iterdir())
    assert names == ["best", "metrics.csv", "step_00000006", "step_00000012.saving"]
    assert len(metrics.read(Path("jaxbptt-train/metrics.csv"))) == 12
    assert train("--resume", "jaxbptt-train") == 0
    assert_same(state_of("jaxbptt-train"), in_one_go()["state"])
    assert Path("jaxbptt-train/metrics.csv").read_bytes() == in_one_go()["metrics"]
    assert not list(Path("jaxbptt-train").glob("*.saving"))


@pytest.mark.slow
def test_two_processes_and_two_devices_are_as_good_as_one():
    """Two processes that meet on loopback, and one with two devices, end with the params of one alone."""
    arguments = [*TEXT_RUN, "--updates", "24"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    runs = [process(*arguments, "--checkpoints", "two", **together, JAX_PROCESS_ID=str(i)) for i in range(2)]
    runs.append(process(*arguments, "--checkpoints", "devices", "--devices", "2"))
    one = in_one_go()
    outputs = [alone.communicate(timeout=300) for alone in runs]
    assert [alone.returncode for alone in runs] == [0, 0, 0], outputs
    assert "2 devices (cpu)" in outputs[0][0]
    # The library that carries their sums has a word of its own.
    assert [line for line in outputs[1][0].splitlines() if not line.startswith("[Gloo]")] == []
    Path("one.csv").write_bytes(one["metrics"])
    rows = metrics.read(Path("one.csv"))
    for folder in ("two", "devices"):
        other = state_of(folder)
        for name, leaf in one["state"].items():
            if name.startswith((".params", ".carry")):
                np.testing.assert_allclose(other[name], leaf, rtol=1e-5, atol=1e-6, err_msg=f"{folder} {name}")
        ours = metrics.read(Path(folder, "metrics.csv"))
        assert [row["update"] for row in ours] == list(range(1, 25))
        np.testing.assert_allclose([row["loss"] for row in ours], [row["loss"] for row in rows], rtol=1e-5)
        assert Path(folder, "learning-curve.png").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3", "SLURM_NTASKS": "9"}, (4, 3)),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h:1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_STEP_NODELIST": "n[1-8]"}, (8, 5)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (2, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    ],
)
def test_launchers(environment, expected):
    assert cluster.processes(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, or unset it"),
        (
            {"JAX_NUM_PROCESSES": "2"},
            "JAX_NUM_PROCESSES is '2' and JAX_PROCESS_ID is None: both have to be whole numbers",
        ),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2, but JAX_NUM_PROCESSES is 2"),
    ],
)
def test_launchers_that_make_no_sense(environment, message):
    with pytest.raises(tasks.InputError, match=message):
        cluster.processes(environment)


def test_processes_that_cannot_meet(monkeypatch, capsys):
    """Here since jax has started already; what it says is handed on in one line."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert train(*TEXT_RUN) == 2
    error = capsys.readouterr().err
    assert re.match(
        r"jaxbptt train: process 1 of 2 can't connect to the others: .*Set JAX_COORDINATOR_ADDRESS to the host:port",
        error,
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], r"nowhere\.txt can't be read: No such file or directory\."),
        (["--text", "."], r"\. can't be read: Is a directory\."),
        (["--text", "/dev/null"], r"/dev/null is not a file\."),
        (["--text", "empty.txt"], r"empty\.txt is empty\."),
        (["--text", "short.txt"], r"short\.txt has 2 time steps for training, but --batch 2 needs 3"),
        (["--text", "data.txt", "--validation", "0.003"], r"data\.txt has 1 time step for validation"),
        (["--csv", "short.txt"], r"short\.txt has no rows of numbers"),
        (["--npz", "data.txt"], r"data\.txt is not a readable \.npz file"),
        (["--npz", "short.npy"], r"short\.npy is not a readable \.npy file of plain numbers: "),
        (["--npz", "nan.npy"], r"nan\.npy is nan at \[time, feature\] = \[230, 1\]\."),
        (["--checkpoints", "data.txt"], r"--checkpoints data\.txt is a file, not a folder\."),
        (
            ["--checkpoints", "data.txt/run"],
            r"--checkpoints data\.txt/run can't be written: .*data\.txt is not a folder",
        ),
        (["--metrics", "nowhere/m.csv"], r"--metrics nowhere/m\.csv can't be written: there is no folder nowhere"),
        (["--metrics", "m.txt"], r"--metrics m\.txt ends in '\.txt': use \.csv or \.jsonl\."),
        (["--metrics", "data.csv"], r"--metrics data\.csv exists and does not hold metrics of jaxbptt"),
        (["--figure", "."], r"--figure \. is a folder or a device, not a file"),
        (["--figure", "f.gif"], r"--figure f\.gif ends in '\.gif'"),
        (["--devices", "3"], r"--batch 2 can't be divided evenly over --devices 3: use a multiple of 3\."),
        (["--devices", "2"], r"--devices 2: only 1 device of kind cpu available\."),
        (["--schedule", "cosine", "--minutes", "1"], r"--schedule cosine needs --updates"),
        (["--resume", "jaxbptt-train"], r"--resume jaxbptt-train has no checkpoint to resume from\."),
        (["--resume"], r"argument --resume: expected one argument"),
        (["--schedule", "linear", "--warmup", "5", "--updates", "5"], r"--warmup 5 leaves no update after it"),
        (["--layer-norm", "--cell", "gru"], r"--layer-norm is there for --cell lstm, not for gru"),
        (["--patience", "3", "--validation", "0"], r"--patience counts validations, and --validation 0 leaves none"),
        (["--text", "data.txt", "--target", "1"], r"--target is for numbers: leave it out"),
        (["--npz", "data.npy", "--embedding", "3"], r"--embedding is for text: leave it out"),
        (
            ["--text", "data.txt", "--steps", "144"],
            r"--steps 144 is longer than a row: data\.txt has 286 time steps for "
            r"training, which make --batch 2 rows of 143\. Use at most --steps 143, or a smaller --batch\.",
        ),
        (["--npz", "data.npy", "--target", "2", "column 2"], r"--target names column 2 twice\."),
        (["--npz", "data.npy", "--season", "217"], r"--season 217 is longer than the 216 rows before validation\."),
        (["--seed", "4294967296"], r"argument --seed: 4294967296 is too large: less than 2\*\*32 is needed"),
        (["--export", "nowhere/w.npz"], r"--export nowhere/w\.npz can't be written: there is no folder nowhere"),
        (["--on-update", "nothing"], r"'nothing' does not name a hook"),
        (["--export", "w.txt"], r"--export w\.txt ends in '\.txt': use \.safetensors or \.npz\."),
        (["--hidden", "0"], r"argument --hidden: 0 is too small: at least 1 is needed"),
        (["--sample", "-1"], r"argument --sample: -1 is too small: at least 0 is needed"),
        (["--validation", "1"], r"argument --validation: 1 is not a share"),
        (["--minutes", "0"], r"argument --minutes: 0 is too small: more than 0 is needed"),
        (["--temperature", "-1"], r"argument --temperature: -1 is too small"),
        (["--learning-rate", "nan"], r"argument --learning-rate: nan is not finite"),
        (["--learning-rate", "fast"], r"argument --learning-rate: 'fast' is not a number"),
        (["--text", "a", "--csv", "b"], r"argument --csv: not allowed with argument --text"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    Path("empty.txt").touch()
    Path("short.txt").write_text("ab")
    Path("short.npy").write_bytes(Path("data.npy").read_bytes()[:200])
    values = np.load("data.npy")
    values[230, 1] = np.nan
    np.save("nan.npy", values)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    try:
        code = train(*SMALL, *arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert re.match("jaxbptt train: " + message, error), error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not Path("jaxbptt-train").exists()


def test_checkpoints_that_do_not_fit(capsys, tmp_path):
    """Other settings, other data, nothing said, a damaged one: one line, exit code 2, and nothing is touched."""
    assert train(*TEXT_RUN, "--updates", "12") == 0
    Path("other.txt").write_text(TEXT[::-1], encoding="utf-8")
    capsys.readouterr()
    newest = Path("jaxbptt-train/step_00000012")

    def refused(message, *arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert train(*arguments) == 2
        error = capsys.readouterr().err
        assert re.match("jaxbptt train: " + message, error), error
        assert error.count("\n") == 1
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    resume = ("--resume", "jaxbptt-train")
    refused(
        r"--checkpoints jaxbptt-train already has a checkpoint of update 12: continue from it with --resume", *TEXT_RUN
    )
    refused(r"--hidden can't be changed: --resume takes it from the checkpoint", *resume, "--hidden", "256")
    refused(r"--npz was given, but the run is of --text", *resume, "--npz", "data.npy")
    refused(
        r"other\.txt is not the file that the run began with: it has 318 bytes, sha256 .{16}, that one had 318 bytes",
        *resume,
        "--text",
        "other.txt",
    )
    file = next(path for path in sorted((newest / "state").rglob("*")) if path.is_file() and path.parent.name == "d")
    file.write_bytes(file.read_bytes()[:-7])
    refused(r".*step_00000012 is damaged or cut short: .* Remove that folder to go on from step 6\.", *resume)


def test_a_run_that_diverges_stops_before_it_saves(capsys):
    assert train(*SMALL, "--npz", "data.npy", "--updates", "60", "--learning-rate", "1e30") == 2
    error = capsys.readouterr().err
    assert re.match(r"jaxbptt train: at update \d+ the loss is (inf|nan) .*: try a smaller --learning-rate", error)
    assert error.count("\n") == 1
    assert checkpoints.latest("jaxbptt-train") is None


def test_minutes_end_a_run(capsys):
    assert train(*SMALL, "--minutes", "1e-9", "--validation", "0", "--sample", "0", "--text", "data.txt") == 0
    assert checkpoints.latest("jaxbptt-train") == 1
    assert "validation_loss" not in metrics.read(Path("jaxbptt-train/metrics.csv"))[0]
    capsys.readouterr()
    # There is nothing left to do, and that is no error.
    assert train("--resume", "jaxbptt-train", "--updates", "1") == 0
    assert "resumed at update 1" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["rich.console", "orbax.checkpoint", "matplotlib.figure"])
def test_without_the_train_extra(monkeypatch, capsys, module):
    for name in [name for name in sys.modules if name.startswith(("jaxbptt.plots", "jaxbptt.commands.display"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["jaxbptt.commands"], "display", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert train(*TEXT_RUN) == 2
    assert f"{module} is not installed: {words.install_command('train')}\n" in capsys.readouterr().err


def test_the_standard_library_is_the_default():
    _, source = opened()
    assert source.name == "_pydecimal.py"
    assert isinstance(source.values, np.memmap)


def test_mapped_text_reads_in_blocks(monkeypatch):
    monkeypatch.setattr(mapped, "BLOCK_BYTES", 7)
    text = tasks.map_text("data.txt")
    raw = TEXT.encode()
    assert isinstance(text.values, np.memmap)
    assert text.symbols == tuple(sorted(set(raw)))
    assert (text.characters, text.features) == (len(TEXT), len(set(raw)))
    assert text.bytes_per_character == len(raw) / len(TEXT)
    assert text.decode(text.encode(text.values)) == TEXT


def test_mapped_array_reads_in_blocks(monkeypatch):
    monkeypatch.setattr(mapped, "BLOCK_BYTES", 50)
    values = np.load("data.npy")
    series = tasks.map_array("data.npy")
    assert isinstance(series.values, np.memmap)
    assert series.features == 2
    mean, deviation = tasks.mean_and_deviation(series.values, steps=111)
    np.testing.assert_allclose(mean, values[:111].mean(axis=0))
    np.testing.assert_allclose(deviation, values[:111].std(axis=0))
    np.testing.assert_allclose(tasks.mean_and_deviation(values * 1e300)[1], values.std(axis=0) * 1e300)
    np.testing.assert_array_equal(tasks.mean_and_deviation(np.full((9, 1), 0.1))[1], [1.0])
    with pytest.raises(tasks.InputError, match=r"x is inf at \[time\] = \[20\]"):
        tasks.mean_and_deviation(np.where(np.arange(30) == 20, np.inf, 0.0), steps=3, name="x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 2, 2)), r"the array is float64 of shape \(2, 2, 2\), but real numbers of shape \[time\]"),
        (np.zeros(3, complex), r"the array is complex128"),
        (np.zeros((0, 2)), r"the array is empty, its shape is \(0, 2\)"),
        (np.array([{}]), r"is not a readable \.npy file of plain numbers: "),
    ],
)
def test_arrays_that_are_no_series(values, message):
    np.save("x.npy", values)
    with pytest.raises(tasks.InputError, match=message):
        tasks.map_array("x.npy")


def test_an_archive_is_no_array():
    Path("data.npz").rename("other.npy")
    with pytest.raises(tasks.InputError, match="is an archive of arrays"):
        tasks.map_array("other.npy")
    with pytest.raises(tasks.InputError, match=r"nowhere\.npy can't be read: No such file"):
        tasks.map_array("nowhere.npy")


def test_learning_curve():
    steps = np.arange(1, 201)
    drawing = plots.plot_learning_curve((steps, 100.0 / steps), ([100, 200], [2.0, np.inf]), measure="bits")
    (axes,) = drawing.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("update", "bits", "log")
    raw, mean, validation = axes.lines
    np.testing.assert_allclose(raw.get_ydata(), 100.0 / steps)
    np.testing.assert_allclose(mean.get_ydata()[199], np.mean(100.0 / steps[-4:]))
    np.testing.assert_allclose(mean.get_ydata()[1], (100 + 50) / 2)
    np.testing.assert_array_equal(validation.get_ydata(), [2.0, np.nan])
    (axes,) = plots.plot_learning_curve(([1, 2], [1.0, np.nan]), ([], [])).axes
    assert len(axes.lines) == 1
    assert axes.get_yscale() == "linear"
    with pytest.raises(ValueError, match=r"validation has \(1,\) updates and \(2,\) losses"):
        plots.plot_learning_curve(([1], [1]), ([1], [1, 2]))


def test_the_best_is_kept_and_patience_ends_a_run(monkeypatch, capsys):
    """Validations 3, 2, 4, 5: the second is the best, and two in a row without a new best are enough."""
    losses = iter([3.0, 2.0, 4.0, 5.0, 1.0])
    build = compiled.compile_run
    monkeypatch.setattr(compiled, "compile_run", lambda *a: build(*a)._replace(validate=lambda params: next(losses)))
    assert train(*TEXT_RUN, "--updates", "24", "--patience", "2", "--save-every", "3") == 0
    assert "Stopped early: no validation was better than that of update 6." in capsys.readouterr().out
    record = checkpoints.record("jaxbptt-train")
    assert record.step == 12
    best = {"update": 6, "validation_loss": 2.0}
    assert record.info["metrics"].items() >= {"since_best": 2, "validation_loss": 5.0, "best": best}.items()
    assert checkpoints.record("jaxbptt-train/best").step == 6
    model = bptt.load("jaxbptt-train")
    assert (model.step, bptt.load("jaxbptt-train", which="last").step) == (6, 12)
    assert model.info["versions"]["jax"] == jax.__version__
    assert model.vocabulary.decode(model.settings["prompt"]) == TEXT.encode()[276:286].decode(errors="ignore")
    # One validation more is patience enough, since those before count too.
    losses = iter([6.0])
    assert train("--resume", "jaxbptt-train", "--updates", "24") == 0
    assert checkpoints.latest("jaxbptt-train") == 15


def test_the_model_that_is_loaded_is_the_one_that_was_trained():
    """Its loss on the validation data is the one that was measured."""
    network = ["--layers", "2", "--dropout", "0.5", "--target", "2"]
    assert train(*SMALL, "--npz", "data.npy", "--updates", "12", *network) == 0
    model = bptt.load("jaxbptt-train", which="last")
    values = np.load("data.npy")
    rows = model.columns.encode(values[216:])
    expected = [row for row in metrics.read(Path("jaxbptt-train/metrics.csv")) if "validation_loss" in row][-1]
    # Two rows of 12 and 11 steps, as a stream cuts them.
    errors = []
    for low, high in ((0, 12), (12, 23)):
        _, predicted = model.network.apply(model.params, model.carry, rows[low:high])
        errors += ((predicted[:, 0] - rows[low + 1 : high + 1, 1]) ** 2).tolist()
    np.testing.assert_allclose(np.mean(errors), expected["validation_loss"], rtol=1e-4)
    assert model.columns.target_names == ("column 2",)
    assert np.shape(bptt.load("jaxbptt-train").info["errors"]["network"]) == (12, 1)


def test_missing_entries_do_not_count(monkeypatch):
    """The loss is the mean over the entries that were observed."""
    values = np.load("data.npy")
    observed = np.random.default_rng(0).random(values.shape) < 0.7
    table = tasks.Table("t.csv", ("a", "b"), values, observed, None, (), (1, 2))
    monkeypatch.setattr(tasks, "read_table", lambda path, **_: table)
    options = _parser().parse_args(["train", *SMALL, "--csv", "data.csv", "--target", "b"])
    options.reading = {"missing": "mask"}
    source = sources.open_source(options)
    training = train_options.settings_of(options, train_options.TRAINING)
    architecture = compiled.architecture_of(training, source)
    run = compiled.compile_run(architecture, training, 10, source, None, 1)
    # Row 0 has the steps from 0 on, row 1 those from 108 on.
    inputs, counted = (
        np.stack([array[30:40], array[138:148]], axis=1) for array in (source.columns.encode(values), observed)
    )
    targets, counted = (
        np.stack([array[31:41, 1], array[139:149, 1]], axis=1) for array in (source.columns.encode(values), observed)
    )
    with jax.enable_x64(False):
        _, outputs = run.network.apply(run.state.params, run.state.carry, inputs)
        _, measured = run.update(run.state, source.training.at(3))
    np.testing.assert_allclose(measured.loss, np.mean((outputs[..., 0] - targets)[counted] ** 2), rtol=1e-5)
    assert int(measured.aux) == counted.sum() < counted.size


def test_a_run_that_grows_worse_than_a_constant_stops(monkeypatch, capsys):
    monkeypatch.setattr("jaxbptt.commands.run.DIVERGED_UPDATES", 6)
    steep = ["--optimizer", "sgd", "--clip", "1e9"]
    assert train(*SMALL, "--npz", "data.npy", "--updates", "60", "--learning-rate", "30", *steep) == 2
    error = capsys.readouterr().err
    assert re.match(
        r"jaxbptt train: at update \d+ the loss is [\d.e+]+, and for long it has been above 1, that of a constant",
        error,
    )


def test_a_run_that_learns_nothing_says_so(monkeypatch, capsys):
    monkeypatch.setattr("jaxbptt.commands.run.DIVERGED_UPDATES", 6)
    assert train(*TEXT_RUN, "--updates", "12", "--learning-rate", "1e-9") == 1
    printed = capsys.readouterr()
    counts = np.unique(np.frombuffer(TEXT.encode()[:286], np.uint8), return_counts=True)[1] / 286
    constant = -np.sum(counts * np.log2(counts)) * 318 / 306
    assert f"at the end the loss is still above {constant:.3g} bits per character" in printed.err
    assert "Checkpoints: jaxbptt-train" in printed.out


def test_what_does_not_fit_in_memory_is_refused_before_it_is_run(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "available_bytes", lambda device: 2**20)
    assert train(*SMALL, "--npz", "data.npy", "--hidden", "256") == 2
    error = capsys.readouterr().err
    assert re.match(
        r"jaxbptt train: an update needs 0\.0 GiB, but there are 0\.0 GiB left: use a smaller --steps", error
    )
    assert not Path("jaxbptt-train").exists()


def test_available_memory():
    """What this machine says, and what a control group leaves of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available_bytes(jax.devices()[0]) <= total
    Path("memory.max").write_text("5000\n")
    Path("memory.current").write_text("3000\n")
    Path("memory.stat").write_text("anon 10\ninactive_file 700\n")
    assert memory._group("memory.max", "memory.current") == 2700
    Path("memory.max").write_text("max\n")
    assert memory._group("memory.max", "memory.current") is None
    assert memory._group("nowhere", "nowhere") is None


@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
def test_learning_rates(schedule):
    rate = optimizers.learning_rate(0.6, 4, schedule, 24)
    rates = np.array([float(rate(i)) for i in range(25)])
    np.testing.assert_allclose(rates[:5], [0.12, 0.24, 0.36, 0.48, 0.6], rtol=1e-6)
    falling = np.arange(21) / 20
    expected = {"constant": 1 + 0 * falling, "linear": 1 - falling, "cosine": (1 + np.cos(np.pi * falling)) / 2}
    np.testing.assert_allclose(rates[4:], 0.6 * expected[schedule], atol=1e-6)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizers_and_weight_decay(name):
    """A step goes down the gradient; matrices shrink on top of that by rate · decay, biases do not."""
    params = {"W": jnp.full((2, 2), 3.0), "b": jnp.full(2, 3.0)}
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), params)
    steps = {}
    for decay in (None, 0.0, 0.1):
        transform = optimizers.optimizer(name, 0.2, weight_decay=decay, warmup=0, schedule="constant", updates=None)
        steps[decay], _ = transform.update(gradient, transform.init(params), params)
    assert all((leaf < 0).all() for leaf in jax.tree.leaves(steps[0.0]))
    np.testing.assert_allclose(steps[0.1]["W"] - steps[0.0]["W"], -0.2 * 0.1 * 3)
    np.testing.assert_array_equal(steps[0.1]["b"], steps[0.0]["b"])
    of_its_own = 0.01 if name == "adamw" else 0.0
    np.testing.assert_allclose(steps[None]["W"] - steps[0.0]["W"], -0.2 * of_its_own * 3, atol=1e-9)


def test_hooks_and_weights_at_the_end(monkeypatch, capsys):
    Path("my_hooks.py").write_text("seen = []\ndef on_update(metrics):\n    seen.append(metrics)\n")
    monkeypatch.syspath_prepend(".")
    options = ["--on-update", "my_hooks:on_update", "--tensorboard", "tb", "--export", "weights.npz"]
    assert train(*SMALL, "--npz", "data.npy", "--updates", "8", *options) == 0
    import my_hooks

    rows = metrics.read(Path("jaxbptt-train/metrics.csv"))
    assert [seen["update"] for seen in my_hooks.seen] == list(range(1, 9))
    for seen, row in zip(my_hooks.seen, rows, strict=True):
        np.testing.assert_allclose([seen[key] for key in row], list(row.values()), rtol=1e-6)
    assert len(list(Path("tb").glob("events.*"))) == 1
    weights = np.load("weights.npz")
    np.testing.assert_array_equal(weights["W_hy"], bptt.load("jaxbptt-train").params.W_hy)
    assert "Weights: weights.npz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--npz", "data.npy", "--export", "./data.npy"], "train: --export data.npy is a file that is read"),
        (["report", "--csv", "data.csv", "--output", "data.csv"], "report: --output data.csv is a file that is read"),
        (
            ["forecast", "run", "--csv", "data.csv", "--steps", "3", "--output", "data.csv"],
            "forecast: --output data.csv is",
        ),
        (
            ["forecast", "run", "--steps", "3", "--output", "run/metrics.csv"],
            "--output run/metrics.csv is where `train`",
        ),
        (["export", "run", "--output", "run/best/x.npz"], "export: --output run/best/x.npz is where `train` writes"),
    ],
)
def test_no_output_replaces_what_is_read(capsys, arguments, message):
    before = Path("data.csv").read_bytes(), Path("data.npy").read_bytes()
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert (Path("data.csv").read_bytes(), Path("data.npy").read_bytes()) == before


def test_ctrl_c_while_compiling_waits_for_its_end(monkeypatch, capsys):
    """A signal in the middle of XLA's work has crashed the process."""
    build = compiled.compile_run

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return build(*arguments)

    monkeypatch.setattr(compiled, "compile_run", interrupted)
    assert train(*TEXT_RUN) == 130
    assert "interrupted, nothing saved" in capsys.readouterr().err
    assert not Path("jaxbptt-train").exists()


def test_sizes_that_fit_a_short_series():
    """32 rows of 64 steps where there is room, fewer where there is not; what is given stays."""
    for steps, given, expected in (
        (10_000, [], (32, 64)),
        (1_000, [], (4, 64)),
        (600, [], (4, 64)),
        (100, [], (1, 64)),
        (40, [], (1, 35)),
        (1_000, ["--steps", "10"], (32, 10)),
        (1_000, ["--batch", "32"], (32, 29)),
    ):
        np.save("series.npy", np.arange(float(steps)))
        options, source = opened("--npz", "series.npy", *given)
        assert (options.batch, options.steps) == expected, (steps, given)
        assert source.training.at(0).xs.shape == (expected[1], expected[0], 1)


def test_columns_that_do_not_change(capsys):
    values = np.load("data.npy")
    np.save("same.npy", np.stack([values[:, 0], np.full(240, 3.0)], axis=1))
    _, source = opened(*SMALL, "--npz", "same.npy")
    assert "the same in every row of the training data: column 2" in source.words
    assert source.constant_loss == 0.5
    Path("same.txt").write_text("a" * 100)
    for data in (["--text", "same.txt"], ["--npz", "same.npy", "--target", "2"]):
        assert train(*SMALL, *data) == 2
        assert "is the same at every step of the training data: there is nothing to learn" in capsys.readouterr().err


def masked(values, observed):
    return tasks.Table("t.csv", tuple("ab"[: values.shape[1]]), values, observed, None, (), ())


def test_what_is_missing_does_not_standardise(monkeypatch):
    values = np.load("data.npy")
    observed = np.random.default_rng(0).random(values.shape) < 0.7
    monkeypatch.setattr(tasks, "read_table", lambda path, **_: masked(values, observed))
    _, source = opened(*SMALL, "--csv", "data.csv", "--missing", "mask")
    seen = np.where(observed, values, np.nan)[:216]
    np.testing.assert_allclose(source.columns.mean, np.nanmean(seen, axis=0))
    np.testing.assert_allclose(source.columns.deviation, np.nanstd(seen, axis=0))
    changes = np.diff(seen / np.nanstd(seen, axis=0), axis=0)
    np.testing.assert_allclose(source.change, np.sqrt(np.nanmean(changes**2, axis=0)), rtol=1e-5)


@pytest.mark.parametrize(("part", "where"), [("training", slice(1, 216)), ("validation", slice(217, None))])
def test_a_target_without_numbers_is_refused(monkeypatch, capsys, part, where):
    values = np.load("data.npy")
    observed = np.ones(values.shape, bool)
    observed[where, 1] = False
    monkeypatch.setattr(tasks, "read_table", lambda path, **_: masked(values, observed))
    assert train(*SMALL, "--csv", "data.csv", "--missing", "mask") == 2
    assert f"t.csv: b has no number in the {part} data" in capsys.readouterr().err


def test_a_chunk_without_an_entry_that_counts_has_no_loss(monkeypatch):
    values = np.load("data.npy")[:, :1]
    observed = np.ones(values.shape, bool)
    observed[1:11] = observed[109:119] = False
    monkeypatch.setattr(tasks, "read_table", lambda path, **_: masked(values, observed))
    assert train(*SMALL, "--csv", "data.csv", "--missing", "mask", "--updates", "3") == 0
    rows = metrics.read(Path("jaxbptt-train/metrics.csv"))
    assert ["loss" in row for row in rows] == [False, True, True]


def test_errors_are_known_of_the_last_too(monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    build = compiled.compile_run
    monkeypatch.setattr(compiled, "compile_run", lambda *a: build(*a)._replace(validate=lambda params: next(losses)))
    assert train(*SMALL, "--npz", "data.npy", "--updates", "18") == 0
    best, last = (bptt.load("jaxbptt-train", which=which) for which in ("best", "last"))
    assert (best.step, last.step) == (6, 18)
    assert best.info["errors"]["network"] != last.info["errors"]["network"]


def test_a_damaged_best_says_that_there_is_a_last(tmp_path):
    assert train(*TEXT_RUN, "--updates", "6") == 0
    next(Path("jaxbptt-train/best").rglob("record.json")).write_text("{")
    with pytest.raises(checkpoints.CheckpointError, match="The last checkpoint is one folder above: which='last'"):
        bptt.load("jaxbptt-train")
    assert bptt.load("jaxbptt-train", which="last").step == 6


def test_nothing_left_to_do(capsys):
    assert train(*TEXT_RUN, "--updates", "6") == 0
    assert train("--resume", "jaxbptt-train") == 0
    assert "Nothing is left to do: the run is to end at update 6." in capsys.readouterr().out


def test_what_is_easy_is_said(monkeypatch):
    """On the validation data, in the units of the losses that follow."""
    values = np.load("data.npy")
    _, source = opened(*SMALL, "--npz", "data.npy", "--target", "2")
    encoded = (values[216:, 1] - values[:216, 1].mean()) / values[:216, 1].std()
    last, mean = np.mean(np.diff(encoded) ** 2), np.mean(encoded[1:] ** 2)
    assert source.words[-1] == f"easy to reach: {last:.3f} by the last value (persistence), {mean:.3f} by the mean"
    observed = np.arange(240) % 3 > 0
    monkeypatch.setattr(tasks, "read_table", lambda path, **_: masked(values[:, 1:], observed[:, None]))
    _, source = opened(*SMALL, "--csv", "data.csv", "--missing", "mask")
    seen = observed[217:]
    deviation = values[:216, 1][observed[:216]].std()
    assert f"{np.mean((np.diff(values[216:, 1]) / deviation)[seen] ** 2):.3f} by the last value" in source.words[-1]
    _, source = opened(*TEXT_RUN)
    assert (
        source.words[-1]
        == f"easy to reach: {source.measure(source.constant_loss):.3f} bits per character by frequencies alone"
    )
