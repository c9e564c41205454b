"""The message path as machine code: what `pip install .` and the wheels do beyond copying files.

mypyc compiles the modules that pyproject.toml lists, from their own annotations; the sources are installed
beside. Without a C compiler they are what runs. RELAY_COMPILE=never wants it so, RELAY_COMPILE=always fails
where it cannot be had. An editable installation is never compiled: there the sources are to be what runs.
docs/adr/0030-compiled-message-path.md has the reason and the figures.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WISHES = ("auto", "always", "never")
OPTIONS = ("--config-file=", "--no-site-packages", "--ignore-missing-imports")
"""The same wherever it is compiled: no library is looked at. So nothing that inherits from one's class can be
compiled: its layout would not be known, and what came out would break the interpreter.
"""


class CompileHook(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel."""

    _place: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the installation is editable or nobody wants or can have it."""
        wish = os.environ.get("RELAY_COMPILE", "auto")
        if wish not in WISHES:
            raise ValueError(f"RELAY_COMPILE is {wish!r}; it can be {', '.join(WISHES)}")
        if version == "editable" or wish == "never":
            return
        if (missing := _missing()) is not None:
            if wish == "always":
                raise RuntimeError(f"RELAY_COMPILE=always, and {missing}")
            self.app.display_warning(f"not compiled, the sources run in its place: {missing}")
            return
        self._place = tempfile.TemporaryDirectory(prefix="relay-compile-")
        with contextlib.chdir(self.root):
            made = _compile(self.config["modules"], Path(self._place.name))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"].update({str(path): name for name, path in made.items()})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was needed on the way."""
        del version, build_data, artifact_path
        if self._place is not None:
            self._place.cleanup()


def _missing() -> str | None:
    """Say what a compilation lacks here; None if it lacks nothing."""
    command = (os.environ.get("CC") or sysconfig.get_config_var("CC")).split()
    include = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    look = [*command, *include, "-fsyntax-only", "-x", "c", "-"]
    try:
        subprocess.run(look, input=b"#include <Python.h>\n", check=True, capture_output=True)
    except FileNotFoundError:
        return f"there is no C compiler ({command[0]})"
    except subprocess.CalledProcessError:
        return "there is no Python.h (Debian: python3-dev)"
    return None


def _compile(modules: list[str], place: Path) -> dict[str, Path]:
    """Compile the modules into `place`; return each file that was made, by its name in the wheel."""
    from mypyc.build import mypycify  # not there for an editable installation, and slow to load
    from setuptools import Distribution

    built = place / "built"
    extensions = mypycify(
        [*OPTIONS, *modules], multi_file=True, target_dir=str(place / "c"), opt_level="2", debug_level="0"
    )
    for extension in extensions:
        # What one module asks of another is asked directly, not through tables for others to change.
        extension.extra_compile_args.append("-fvisibility=hidden")
    command = Distribution({"name": "relay", "ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(built), str(place / "objects")
    command.parallel = os.cpu_count()
    command.ensure_finalized()
    command.run()
    return {str(path.relative_to(built)): path for path in built.rglob("*.so")}
