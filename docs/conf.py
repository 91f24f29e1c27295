"""The site: `sphinx-build -W docs build/docs`. Nothing is fetched from the network, when it is built or when it is read."""

import ast
import inspect
import re
import shutil
import textwrap
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref

import jaxbptt

# Sphinx reads what is below this folder. No symbolic link: an archive of the source would have one of the two alone.
PAGES = Path(__file__).parent
shutil.copytree(PAGES.parent / "notebooks", PAGES / "notebooks", dirs_exist_ok=True)

project = "jaxbptt"
author = copyright = "The jaxbptt developers"
release = version = jaxbptt.__version__
nitpicky = True
# Annotations name types of jax, optax and Python, which have no page here.
nitpick_ignore_regex = [("py:class", ".*")]
exclude_patterns = ["build", "**.ipynb_checkpoints"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_llm.txt"]
html_theme = "sphinx_book_theme"
html_title = "jaxbptt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],  # the search field is in the sidebar
}
html_math_renderer = "mathml"
html_copy_source = False
html_context = {"default_mode": "auto"}
# After the HTML build, whose doctrees it reads: in parallel everything would be read, and the gallery executed, twice.
llms_txt_build_parallel = False
llms_txt_suffix_mode = "replace"
llms_txt_description = "Gradients of recurrences through time in JAX: by every method, checked, and analysed."

# The gallery is executed at each build; the notebooks are shown as committed, and the test suite executes them.
nb_execution_mode = "force"
nb_execution_excludepatterns = ["notebooks/*"]
nb_execution_raise_on_error = True
nb_execution_timeout = 300
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


def signature_as_written(app, what, name, obj, options, signature, return_annotation):
    """Annotations as in the source: what jaxtyping makes of `Float[Array, "time hidden"]` at run time is hard to read."""
    if inspect.isfunction(obj):
        function = parsed(obj)
        if what == "method":
            del function.args.args[0]
        return f"({ast.unparse(function.args)})", function.returns and ast.unparse(function.returns)
    if hasattr(obj, "_fields"):
        declared = {}
        for base in reversed(obj.__mro__):
            if hasattr(base, "__annotations__") and base.__module__.startswith("jaxbptt"):
                declared |= {line.target.id: line for line in parsed(base).body if isinstance(line, ast.AnnAssign)}
        return f"({', '.join(ast.unparse(declared[field]).replace(' = ', '=') for field in obj._fields)})", None
    return None


def parsed(obj):
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


def skip_fields(app, what, name, obj, skip, options):
    """Fields of a NamedTuple are in its docstring's `Attributes`."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def plain_text(app, what, name, obj, options, lines):
    """Docstrings use reST for code and lists only: a paragraph of equations keeps its lines, and |x| and * are themselves."""
    done = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if is_equation(paragraph):
            paragraph = ".. code-block:: text\n   :class: equation\n\n" + textwrap.indent(
                paragraph.replace("`", ""), "   "
            )
        elif not paragraph.lstrip().startswith(">>>"):
            paragraph = "`".join(
                part if i % 2 else re.sub(r"(?<!\\)\||(?<![\\*])\*(?!\*)|_(?!\w)", r"\\\g<0>", part)
                for i, part in enumerate(paragraph.split("`"))
            )
        done.append(paragraph)
    lines[:] = "\n\n".join(done).split("\n")


def is_equation(paragraph):
    """Prose ends with a full stop or a colon."""
    is_text = paragraph.startswith((" ", ":", ">>>", "..", "-", "`")) or paragraph.rstrip().endswith((".", ":"))
    return not is_text and re.search(r" [=≤<↦←] ", paragraph) is not None


def tidy(app, doctree):
    """The * before keyword-only arguments as text, which the Markdown builder keeps; no empty lines at the end of code."""
    for abbreviation in list(doctree.findall(nodes.abbreviation)):
        abbreviation.replace_self(nodes.Text(abbreviation.astext()))
    for block in doctree.findall(nodes.literal_block):
        if block.rawsource == block.astext():  # else it has markup of its own
            block.rawsource = block.astext().rstrip()
            block.children = []
            block += nodes.Text(block.rawsource)


def link_names(app, doctree, docname):
    """Code that is the name of something with an entry in the reference becomes a link to it."""
    objects = app.env.domains["py"].objects
    for literal in list(doctree.findall(nodes.literal)):
        found = full_name(literal.astext(), objects)
        if found is None or isinstance(literal.parent, nodes.reference | pending_xref | nodes.title):
            continue
        target = objects[found]
        if target.docname == docname and inside(literal, found):
            continue
        uri = app.builder.get_relative_uri(docname, target.docname) + "#" + target.node_id
        literal.replace_self(nodes.reference("", "", literal.deepcopy(), internal=True, refuri=uri))


def full_name(text, objects):
    """`bptt.scan`, `scan(...)`, `losses.final_step` and `LyapunovSpectrum` by the name they have in the reference, or None."""
    text = text.partition("(")[0]
    text = text.removeprefix("jaxbptt.").removeprefix("bptt.") if text != "bptt.bptt" else "bptt"
    names = (f"jaxbptt.{space}{text}" for space in ("", "analysis.", "plots.", "training."))
    return next((name for name in names if name in objects), None)


def inside(node, name):
    """Whether a node stands in the entry of this name."""
    while node is not None:
        if any(
            name in part.get("ids", ()) for part in getattr(node, "children", ()) if isinstance(part, nodes.Element)
        ):
            return True
        node = node.parent
    return False


def mathml(display):
    """Formulas are drawn by the browser: a script that does it would have to be fetched."""

    def visit(translator, node):
        translator.body.append(f'<span class="math">{convert(node.astext(), display=display)}</span>')
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("autodoc-process-docstring", plain_text, priority=900)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", tidy)
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
