"""What mkdocs does beside its own work: pages and files from outside ``docs/``, and Sphinx's roles in docstrings.

Links are written for the repository. Everything that a page links to is put on the site, at the same place, except that
``docs/`` is the site's root and the README its first page.
"""

import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)([\w.]+)`")


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def resolve(page: str, link: str) -> str:
    """Return the file of the repository that a page links to."""
    return os.path.normpath(os.path.join(os.path.dirname(page), link))


def on_files(files: Any, config: Any) -> Any:
    """Add the README, and what pages link to, to the files of the site."""
    pages = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path in pages:  # grows
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            links = (resolve(path, link) for _, link in LINK.findall((ROOT / path).read_text()))
            pages += [link for link in links if (ROOT / link).is_file() and link not in pages]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = os.path.relpath(page.file.abs_src_path, ROOT)

    def rewrite(match: re.Match[str]) -> str:
        target = site_path(resolve(here, match[2]))
        return match[1] + os.path.relpath(target, os.path.dirname(page.file.src_uri))

    return LINK.sub(rewrite, markdown)


class SphinxRoles(griffe.Extension):
    """``:class:`~nepa_plugin.NepaViT` `` in a docstring becomes a link of mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return
        scope = obj if obj.is_class or obj.is_module else obj.parent

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            if name.startswith("."):  # of the same room
                target = obj.package.path + "." + obj.path.split(".")[1] + name
            else:
                target = name if name.startswith("nepa_plugin.") or scope is None else scope.resolve(name)
            return f"[`{name.rsplit('.', 1)[-1] if short else name}`][{target}]"

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
