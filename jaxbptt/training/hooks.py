r"""What is called after each update with its metrics: TensorBoard's files, or a function of the user's own.

A hook is `on_update(metrics)`. `metrics` is a dict with "update", the number of updates so far, "loss", "gradient_norm" and
what else was measured, as floats; "validation_loss" is in it only after the updates where that was computed. A hook with
something to finish has a `close()`, which `close` calls.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxbptt.tasks import InputError
from jaxbptt.words import install_command

Metrics = Mapping[str, float]
Hook = Callable[[Metrics], Any]

# Seconds after which what was written can be seen in TensorBoard.
_FLUSH_SECONDS = 10


def tensorboard(folder: str | Path) -> "TensorBoard":
    r"""A hook that writes every metric as a scalar for TensorBoard, through tensorboardX (extra `tensorboard`).

    The step of a scalar is its update. Where a run is resumed in the same folder, TensorBoard hides what an earlier file has
    from the first update on that is written again.

    Args:
        folder: for `tensorboard --logdir`; made if it doesn't exist.

    Returns:
        The hook. It writes to the disk every ten seconds and when it is closed: by `close()`, by leaving a `with`, or at the
        end of the process.

    Raises:
        InputError: without tensorboardX, or where the folder can't be written.

    Example:
        >>> import tempfile, pathlib
        >>> from jaxbptt import hooks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with hooks.tensorboard(folder) as on_update:
        ...         on_update({"update": 1, "loss": 2.5})
        ...     print(len(list(pathlib.Path(folder).glob("events.out.tfevents.*"))))
        1
    """
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: {install_command('tensorboard')}") from None
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} can't be written: {error.strerror or error}.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} can't be written: it is read-only.")
    return TensorBoard(partial(tensorboardX.SummaryWriter, str(folder), flush_secs=_FLUSH_SECONDS))


class TensorBoard:
    """The hook that `tensorboard` returns."""

    def __init__(self, open_writer: Callable[..., Any]):
        self._open_writer, self._writer = open_writer, None

    def __call__(self, metrics: Metrics) -> None:
        """Write what was measured at one update."""
        update = int(metrics["update"])
        if self._writer is None:
            # Opened only now, since it has to be told which updates of earlier files are written again; and a file that is
            # opened in the same second has to have another name.
            self._writer = self._open_writer(purge_step=update, filename_suffix=f".{update}")
        for name, value in metrics.items():
            if name != "update":
                self._writer.add_scalar(name, float(value), update)

    def close(self) -> None:
        """Write what is left; an update after this goes to a file of its own."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def close(hook: Hook) -> None:
    """Call the hook's `close()`, where it has one."""
    getattr(hook, "close", lambda: None)()


def load_hook(name: str) -> Hook:
    r"""The hook `module:function`, for the command line.

    The module is looked for in the current folder too. For Weights & Biases, `my_hooks.py` might be::

        import wandb
        run = wandb.init(project="rnn")
        def on_update(metrics):
            run.log(metrics, step=metrics["update"])

    and the hook `my_hooks:on_update`.

    Args:
        name: a module, a colon, and the name of something in it that is called with a dict of metrics.

    Raises:
        InputError: no such module or name in it, a module that can't be imported, something that can't be called.

    Example:
        >>> from jaxbptt import hooks
        >>> on_update = hooks.load_hook("pprint:pprint")
        >>> on_update({"update": 1, "loss": 2.5})
        {'loss': 2.5, 'update': 1}
    """
    module_name, colon, path = name.partition(":")
    if not (colon and path and all(part.isidentifier() for part in f"{module_name}.{path}".split("."))):
        raise InputError(f"{name!r} does not name a hook: write module:function, such as my_hooks:on_update.")
    # `python -m` puts the current folder there, an installed command does not; it stays for what the hook imports later.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"{name}: there is no module {error.name}, neither installed nor in {Path.cwd()}."
            ) from None
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{name}: {module_name} can't be imported: {words}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{name}: {module_name} has no {path}.")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}, but a function of one dict of metrics is expected.")
    return found
