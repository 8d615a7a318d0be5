"""The ``nepa`` command: calls one of ``nepa_plugin.commands`` by name.

It lies outside of the package, whose import takes seconds that `nepa --help` need not wait for.
"""

import difflib
import importlib
import importlib.metadata
import sys

#: Sub-command -> (module, what it does).
COMMANDS = {
    "demo": ("demo", "pretrain NEPA on handwritten digits and look at what it learned (some minutes on a CPU)"),
    "pretrain": ("pretrain", "pretrain a method on a folder of images"),
    "finetune": ("finetune", "fine-tune a backbone on a folder of images with classes"),
    "evaluate": ("evaluate", "score a backbone: kNN, linear and attentive probes, fine-tuning, readout by depth"),
    "predict": ("predict", "classify images with a fine-tuned network"),
    "compare": ("compare", "train several methods on equal terms, evaluate them and write a report"),
    "visualize": ("visualize", "look inside a NEPA backbone: predictions, surprise, attention, features"),
    "generate": ("generate", "let a NEPA backbone go on with images of which it sees the first patches"),
    "convert": ("convert_checkpoint", "convert a checkpoint between timm's, the published and mmengine's layout"),
    "export": ("export", "write a network as ONNX or for torch.export"),
    "shards": ("make_shards", "pack an image folder into tar files for data.train_shards"),
    "segment": ("segment", "segment images with a checkpoint of mmsegmentation"),
    "digit-scenes": ("make_digit_scenes", "write the images of the segmentation demo"),
    "benchmark": ("benchmark", "time the training step on this machine"),
    "configs": ("configs", "list the shipped configs, or print where one of them is"),
}


def usage() -> str:
    """Return the text of ``nepa --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(["usage: nepa COMMAND ...", "", *lines, "", "nepa COMMAND --help lists the command's options."])


def main() -> None:
    """Run the sub-command that ``sys.argv`` names.

    ``sys.argv`` stays as it is: Lightning runs it again for each further device.

    Raises:
        SystemExit: With status 2 and one line on stderr if there is no such sub-command.
    """
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(importlib.metadata.version("nepa-plugin"))
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `nepa {near[0]}`?" if near else "`nepa --help` lists the commands."
        sys.stderr.write(f"error: there is no command `nepa {name}`; {hint}\n")
        sys.exit(2)
    # Only now, as some take seconds to import and some need an extra.
    importlib.import_module(f"nepa_plugin.commands.{COMMANDS[name][0]}").main(args)


if __name__ == "__main__":
    main()
