"""The evaluation of a row in a process of its own, so that rows are evaluated side by side.

python -m nepa_plugin.comparison.evaluating FOLDER PROTOCOL...

FOLDER is that of a run's results; its request says what they are of, on which images, and how.
"""

import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from nepa_plugin.comparison.child import end_with_parent
from nepa_plugin.comparison.plan import REQUEST
from nepa_plugin.evaluation import EvaluationOptions, evaluate
from nepa_plugin.runtime.boundary import in_words
from nepa_plugin.runtime.reading import FileContentError, read_json


def request_for(data: str, options: EvaluationOptions) -> dict[str, Any]:
    """Return what an evaluation is asked to be, for a file."""
    return {"data": data, **asdict(options)}


def read_request(path: Path) -> tuple[str, EvaluationOptions]:
    """Return the images and options of a file of :func:`request_for`; options that it does not name have their default.

    Raises:
        FileContentError: If the file is damaged, or names an option that there is not.
    """
    remedy = f"Remove {path.parent}."
    asked = read_json(path, {"data": str}, remedy)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--options", type=EvaluationOptions)
    options = {key: value for key, value in asked.items() if key != "data"}
    try:
        found: EvaluationOptions = parser.instantiate_classes(parser.parse_object({"options": options})).options
    except (ArgumentError, ValueError) as error:
        raise FileContentError(f"{path} is damaged: {' '.join(str(error).split())} {remedy}") from error
    return asked["data"], found


def main(folder: Path, protocols: list[str]) -> None:
    """Evaluate the backbone beside a folder of results.

    Raises:
        SystemExit: With status 1 if it fails; the last line on stderr says why.
    """
    try:
        data, options = read_request(folder / REQUEST)
        evaluate(folder.parent / "backbone", data, protocols, options, folder)
    except Exception as error:
        traceback.print_exc()
        sys.exit(in_words(error))


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), sys.argv[2:])
