r"""`python -m jaxbptt sample` writes text that a trained model continues a prompt with."""

import argparse
import sys
from typing import Any

import jax

from jaxbptt.commands import arguments
from jaxbptt.models.sampling import sample


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "sample",
        help="write text with a model that `train` has trained on a text",
        description="Prints the prompt and what the model continues it with, and nothing else. The text that the model was "
        "trained on is not needed.",
        formatter_class=arguments.HelpFormatter,
    )
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    a = parser.add_argument
    a(
        "--prompt",
        metavar="TEXT",
        help="text to continue; without it, the end of the training data, which is not printed",
    )
    a("--length", type=arguments.size, default=400, metavar="N", help="characters to write after the prompt")
    a(
        "--temperature",
        type=arguments.at_least_zero,
        default=0.7,
        help="1 draws as often as the model expects, less is more certain; 0 always takes the most likely byte",
    )
    a("--seed", type=int, default=0, help="seed of what is drawn")


def run(options: argparse.Namespace) -> int:
    """Load the model, print the text."""
    with jax.enable_x64(False):
        model = arguments.load_model(options)
        key = jax.random.key(options.seed)
        text = sample(model, options.prompt, length=options.length, temperature=options.temperature, key=key)
    text = (options.prompt or "") + text
    # A terminal or a file may have fewer characters than the text.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
    return 0
