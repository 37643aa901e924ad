"""The site: Markdown pages by MyST, notebooks executed by MyST-NB, docstrings by autodoc.

    pip install '.[docs]'
    sphinx-build -W docs docs/_build        # ESLJAX_SMOKE=1 executes the notebooks in a small size

The build needs no network, and neither does reading the result: MathJax is copied into it.
"""

import ast
import inspect
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

import esljax

HERE = Path(__file__).parent

project = "esljax"
author = "The esljax authors"
project_copyright = "The esljax authors, Apache-2.0"
release = version = esljax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# What the scripts of the experiments print, which the pages include.
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "experiments/results"]
# `setup` below makes this file's functions part of the configuration.
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"esljax {version}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["esljax.css"]

# Sphinx reads files below this folder only, so the notebooks are copied in.
shutil.copytree(
    HERE.parent / "notebooks",
    HERE / "notebooks",
    dirs_exist_ok=True,
    ignore=lambda folder, names: [name for name in names if not name.endswith(".ipynb")],
)
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 1800
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


# --- Docstrings ------------------------------------------------------------

_ITEM = re.compile(
    r"(?:^|(?<=[.;:)]) |(?<=^- )|(?<= - ))((?:`[\w*.]+`(?:, | and )?)+)(?: \([^)`]*\))?: "
)
_SECTION = re.compile(r"^\*\*(Args|Attributes|Fields):\*\*\s*")


def _inline(text: str) -> str:
    """One line of a docstring as reStructuredText, with `code` and **bold** as the only markup."""
    parts = re.split(r"(``[^`]+``|`[^`]+`|\*\*[^*\s][^*]*\*\*)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"[\\*|`]|(?<=\w)_(?!\w)", r"\\\g<0>", part)
        elif part.startswith("`"):
            parts[i] = f"``{part.strip('`')}``"
    return "".join(parts)


def _items(text: str) -> list[str]:
    """A paragraph of arguments, "`x`: this. `y`: that.", as a list of one line each."""
    starts = [match for match in _ITEM.finditer(text)]
    if not starts:
        return []
    ends = [match.start() for match in starts[1:]] + [len(text)]
    lead = text[: starts[0].start()].strip(" -")
    rows = [text[match.start() : end].strip(" -") for match, end in zip(starts, ends, strict=True)]
    return ([_inline(lead), ""] if lead else []) + [f"- {_inline(row)}" for row in rows]


def _block(lines: list[str]) -> list[str]:
    """An indented block: an example, code, or an equation in plain letters."""
    text = inspect.cleandoc("\n".join(lines))
    if text.startswith(">>>"):
        language = "pycon"
    else:
        try:
            ast.parse(text)
            language = "python" if re.search(r"[=(]", text) and "²" not in text else "text"
        except SyntaxError:
            language = "text"
    return [f".. code-block:: {language}", "", *(f"    {line}" for line in text.splitlines()), ""]


def _table(lines: list[str]) -> list[str]:
    rows = [
        [_inline(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines
    ]
    rows = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    out = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        out += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return [*out, ""]


def _restructured(lines: list[str]) -> list[str]:
    """A docstring of this package, paragraph by paragraph, as reStructuredText."""
    out: list[str] = []
    blocks: list[list[str]] = [[]]
    for line in lines:
        last = blocks[-1]
        if not line.strip():
            blocks.append([])
        elif last and _begins(line, last):
            blocks.append([line])
        else:
            last.append(line)
    merged: list[list[str]] = []
    for block in filter(None, blocks):
        code = _kind(block[0]) == "code"
        if code and merged and _kind(merged[-1][0]) == "code":
            merged[-1] += ["", *block]
        else:
            merged.append(block)
    for block in merged:
        if _kind(block[0]) == "code":
            out += _block(block)
        elif block[0].lstrip().startswith("|") and len(block) > 1:
            out += _table(block)
        elif section := _SECTION.match(block[0]):
            rest = " ".join(
                line.strip() for line in [block[0][section.end() :], *block[1:]]
            ).strip()
            out += [f"**{section.group(1)}:**", "", *(_items(rest) or [_inline(rest)]), ""]
        elif block[0].startswith("- "):
            rest = " ".join(line.strip() for line in block)
            out += [*(_items(rest) or _bullets(block)), ""]
        else:
            out += [*(_inline(line.strip()) for line in block), ""]
    return out


def _begins(line: str, block: list[str]) -> bool:
    """Whether a line begins something new though no empty line stands before it."""
    if _SECTION.match(line) or re.match(r"\*\*[A-Z]\w+:\*\*", line):
        return True
    kinds = {_kind(line), _kind(block[-1])}
    return len(kinds) == 2 and not _listed(block)


def _kind(line: str) -> str:
    return "code" if line.startswith("    ") or line.lstrip().startswith(">>>") else "text"


def _listed(block: list[str]) -> bool:
    """Whether an indented line continues an item or a section rather than starting an equation."""
    return block[0].startswith("- ") or bool(_SECTION.match(block[0]))


def _bullets(block: list[str]) -> list[str]:
    rows: list[str] = []
    for line in block:
        if line.startswith("- "):
            rows.append(line[2:])
        else:
            rows[-1] += " " + line.strip()
    return [f"- {_inline(row)}" for row in rows]


def _process(app, what, name, obj, options, lines):
    lines[:] = _restructured(lines)


def _shorten(text: str) -> str:
    """Shapes as the source writes them: no modules, and Key and Scalar by their names."""
    text = re.sub(r"\bjaxlib\._jax\.", "", text.replace("~", ""))
    text = re.sub(
        r"\b(?:esljax|jax|jaxtyping|optax|numpy|np|collections|typing)(?:\.\w+)*\.(?=[A-Za-z])",
        "",
        text,
    )
    text = text.replace("ndarray", "Array")
    text = re.sub(r"Key\[Array, ''\] \| UInt32\[Array, '2'\] \| UInt32\[Array, '4'\]", "Key", text)
    text = re.sub(r"(\w+\[Array, '[^']*'\]) \| \1", r"\1", text)
    return text.replace("Float[Array, '']", "Scalar")


def _signature(app, what, name, obj, options, signature, returns):
    return (
        _shorten(signature) if signature else signature,
        _shorten(returns) if returns else returns,
    )


def _types(app, domain, objtype, contentnode):
    """The types of fields, which no event of autodoc passes on."""
    if domain == "py":
        for part in list(contentnode.parent.findall(addnodes.desc_annotation)):
            if "jaxlib._jax" in part.astext():
                for choice in list(part.findall(addnodes.pending_xref_condition)):
                    if choice["condition"] != "*":
                        choice.parent.remove(choice)
                text = part.astext()
                part.clear()
                part += nodes.Text(_shorten(text))


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _signature)
    app.connect("object-description-transform", _types)
