"""Text from a model: whole characters as a reader counts them, drawn as the model says, from checkpoints alone."""

import functools
import io
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbptt as bptt
from jaxbptt import checkpoints, models, tasks, words
from jaxbptt.__main__ import main
from jaxbptt.models import sampling
from jaxbptt.models.model import settings_of

MIXED = "aé日本\N{GRINNING FACE} e\u0301"
NUMBERS = models.Architecture("elman", 3, 1, 2, 2, text=False, targets=(0, 1), change=(1.0, 1.0))
COLUMNS = models.Columns(("price", "volume"), np.zeros(2), np.ones(2), (0, 1))


@functools.cache
def make(text, prompt="a", hidden=4, **architecture):
    """An untrained model of a text, or of bytes: nothing that it draws is likely to be UTF-8 by itself."""
    raw = text.encode() if isinstance(text, str) else text
    vocabulary = tasks.Vocabulary(tuple(sorted(set(raw))))
    n = len(vocabulary.symbols)
    network = models.build(models.Architecture("elman", hidden, 1, n, n, text=True, **architecture))
    params, carry = network.init(jax.random.key(0)), network.cell.initial_carry()
    params = params._replace(W_hy=3 * params.W_hy)
    prompt = prompt.encode() if isinstance(prompt, str) else prompt
    numbers = [vocabulary.symbols.index(byte) for byte in prompt]
    return models.Model(network, params, carry, vocabulary, None, {"prompt": numbers}, {}, 0)


def draw(model, prompt=None, length=20, temperature=1.0, seed=0):
    return models.sample(model, prompt, length=length, temperature=temperature, key=jax.random.key(seed))


def save(folder, model_or_architecture, columns=None, text=MIXED):
    """A checkpoint as training saves it."""
    if columns is None:
        n = len(set(text.encode()))
        architecture = models.Architecture("elman", 4, 1, n, n, text=True)
        vocabulary, prompt = model_or_architecture.vocabulary, model_or_architecture.settings["prompt"]
        params, carry = model_or_architecture.params, model_or_architecture.carry
    else:
        architecture, vocabulary, prompt = model_or_architecture, None, [[0.0, 0.0]]
        network = models.build(architecture)
        params, carry = network.init(jax.random.key(0)), network.cell.initial_carry()
    init, _ = bptt.tbptt(lambda params, carry, *_, **__: (0.0, carry), optax.sgd(1e-3))
    state = init(params, carry, jax.random.key(0))
    checkpoints.save(folder, 7, state, settings_of(architecture, vocabulary, columns, prompt))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save(folder / "text", make(MIXED))
    save(folder / "numbers", NUMBERS, COLUMNS)
    checkpoints.save(folder / "other", 1, {"w": np.ones(2)}, {})
    return folder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [None, "日", MIXED * 5])
def test_characters_are_whole(prompt, temperature):
    model = make(MIXED)
    for length in (1, 2, 37, 130):
        text = draw(model, prompt, length, temperature)
        assert "\ufffd" not in text
        assert len(text) == length
        assert set(text.encode()) <= set(MIXED.encode())
    assert draw(model, prompt, 130, temperature).startswith(draw(model, prompt, 37, temperature))


def is_utf8(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_what_may_follow_is_what_python_decodes():
    symbols = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # the others are in no UTF-8
    after = sampling._following(symbols, np.zeros(1, int))
    rng = np.random.default_rng(0)
    tails = [bytes(rng.choice([0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0], 3).tolist()) for _ in range(200)]
    candidates = [bytes([first]) + tail[:n] for first in range(256) for tail in tails for n in range(4)]
    for raw in {*candidates, *(chr(code).encode("utf-8", "surrogatepass") for code in range(0, 0x110000, 0x101))}:
        place = 0
        for byte in raw:
            place = after[place, symbols.index(byte)] if place >= 0 and byte in symbols else -1
        assert (place == 0) == is_utf8(raw), raw


def test_a_symbol_that_leads_nowhere_is_not_drawn():
    """Of 日 e6 97 a5 and é c3 a9: 97 follows e6 and c3; e0 would need a0 to bf next, which is there, and f4 then 80 to 8f."""
    raw = sorted({*"日é".encode(), 0xE0})
    after = sampling._following(raw, np.array([0]))
    assert [raw[i] for i in np.flatnonzero(after[0] >= 0)] == [0xC3, 0xE0, 0xE6]
    # f4 can't be followed, so this is no UTF-8, and everything may be drawn.
    assert (sampling._following([*raw, 0xF4], np.array([0])) == 0).all()


def test_a_text_that_is_not_utf8():
    """é of latin-1 followed by what may be the rest of a character: the end of the training data tells."""
    raw = "é\xa0« é ».".encode("latin-1")
    text = draw(make(raw, raw[1:]), length=50)
    assert "\ufffd" in text
    assert len(text) == 50
    with pytest.raises(tasks.InputError, match=r"never seen 'é'.*read as UTF-8, .* so use ASCII characters only\."):
        draw(make(raw, raw[1:]), "é")
    with pytest.raises(tasks.InputError, match=r"never seen 'ü': use only characters of its training text\.$"):
        draw(make("aé"), "ü")


def test_a_prompt_that_ends_within_a_character():
    for cut in (make("日é", "日".encode()[:2]), make("日é", "日é".encode()[1:])):
        text = draw(cut, length=50)
        assert len(text) == 50
        assert "\ufffd" not in text


@pytest.mark.parametrize(
    ("temperature", "shares"), [(1.0, [0.7, 0.2, 0.1]), (0.5, [0.49, 0.04, 0.01]), (0.0, [1, 0, 0])]
)
def test_temperature(temperature, shares):
    model = make("abc")
    params = model.params._replace(W_hy=0 * model.params.W_hy, b_y=jnp.log(jnp.array([0.7, 0.2, 0.1], jnp.float32)))
    model = model._replace(params=params)
    text = draw(model, length=4000, temperature=temperature)
    found = np.array([text.count(letter) for letter in "abc"]) / 4000
    np.testing.assert_allclose(found, np.array(shares) / sum(shares), atol=4 * np.sqrt(0.25 / 4000))
    assert (draw(model, length=200, temperature=temperature, seed=1) == text[:200]) == (temperature == 0)


def test_temperatures_beyond_float32():
    text = draw(make("abc"), length=300, temperature=1e300)
    assert all(text.count(letter) > 60 for letter in "abc")
    assert draw(make("abc"), length=60, temperature=1e-300) == draw(make("abc"), length=60, temperature=0.0)


@pytest.mark.parametrize("embedding", [None, 3])
def test_the_likeliest_byte_is_that_of_the_network(embedding):
    """Prompt and text are read again in one go: across the blocks, every byte is the likeliest one at its place."""
    model = make("abcdefgh", hidden=12, embedding=embedding)
    model = model._replace(params=jax.tree.map(lambda leaf: 2 * leaf, model.params))
    prompt = "abcdefgh" * 9
    text = draw(model, prompt, 100, 0.0)
    _, logits = model.network.apply(model.params, model.carry, model.vocabulary.encode(prompt + text))
    expected = np.argmax(logits, axis=-1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(model.vocabulary.encode(text), expected)
    assert len(set(text)) > 1


def test_compiled_once():
    model = make("abc")
    draw(model)
    before = sampling._read_or_draw._cache_size()
    for prompt, length, temperature in (("b", 3, 0.0), ("abc" * 40, 150, 0.3)):
        draw(model, prompt, length, temperature, seed=5)
    assert sampling._read_or_draw._cache_size() == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": ""}, tasks.InputError, "The prompt is empty: give at least one character"),
        ({"prompt": "bcß"}, tasks.InputError, "The model has never seen 'b', 'c', 'ß'"),
        ({"prompt": "a\udcff"}, tasks.InputError, "The prompt is not UTF-8"),
        ({"length": 0}, ValueError, "length is 0, but it counts characters"),
        ({"temperature": -1.0}, ValueError, r"temperature is -1\.0, but it divides the logits"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"key": 0}, TypeError, "key is 0, but a random key is expected"),
    ],
)
def test_errors(change, error, message):
    options = {"prompt": None, "length": 3, "temperature": 1.0, "key": jax.random.key(0)} | change
    with pytest.raises(error, match=message):
        models.sample(make("a "), **options)


def test_the_command_prints_the_text_alone(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", str(folders / "text"), "--length", "30", "--temperature", "1", "--prompt", "本é"]
    outputs = []
    for seed in ("3", "3", "4"):
        assert main([*arguments, "--seed", seed]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert printed.out.startswith("本é")
        assert printed.out.endswith("\n")
        assert len(printed.out) == 33
        outputs.append(printed.out)
    assert outputs[0] == outputs[1] != outputs[2]
    with jax.enable_x64(False):
        assert outputs[0] == "本é" + draw(bptt.load(folders / "text"), "本é", 30, 1.0, seed=3) + "\n"
    assert main(["sample", str(folders / "text"), "--length", "5"]) == 0
    assert len(capsys.readouterr().out) == 6
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_without_the_characters(folders, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["sample", str(folders / "text"), "--prompt", "aé日", "--length", "3"]) == 0
    output.flush()
    assert output.buffer.getvalue().startswith(b"a??")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["numbers"], r"This is a model of numbers \(price, volume\), .* `python -m jaxbptt forecast` predicts"),
        (
            ["text", "--prompt", "xyz"],
            r"The model has never seen 'x', 'y', 'z': use only characters of its training text",
        ),
        (["text", "--prompt", ""], r"The prompt is empty"),
        (["nowhere"], r".*nowhere holds no checkpoint"),
        (["other"], r".*other has checkpoints, but not of a model"),
        (["text", "--length", "0"], r"argument --length: 0 is too small"),
        (["text", "--temperature", "-1"], r"argument --temperature: -1 is too small"),
        (["text", "--seed", "x"], r"argument --seed: invalid int value: 'x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    try:
        code = main(["sample", *arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert re.match("jaxbptt sample: " + message, printed.err), printed.err
    assert printed.err.count("\n") == 1


def test_without_orbax(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    monkeypatch.delattr(sys.modules.get("orbax", sys), "checkpoint", raising=False)
    for arguments in (["sample"], ["export", "--output", "w.npz"]):
        assert main([*arguments, str(folders / "text")]) == 2
        error = capsys.readouterr().err
        assert error == f"jaxbptt {arguments[0]}: orbax.checkpoint is not installed: {words.install_command('train')}\n"
