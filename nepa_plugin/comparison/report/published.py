"""Published ImageNet-1K numbers of the methods, to read beside one's own; none of them was reproduced here."""

from collections.abc import Sequence

from nepa_plugin.comparison.plan import Run
from nepa_plugin.comparison.report.methods import paper_of
from nepa_plugin.comparison.report.tables import Table

HEADER = ["method", "epochs", "B fine-tuned", "B linear", "B ADE20K", "L fine-tuned", "L linear", "L ADE20K", "source"]
#: Per method: the cells after its name.
PUBLISHED: dict[str, list[str]] = {
    "from scratch": ["", "82.3", "", "47.4", "82.6", "", "49.9", "arXiv 2111.06377"],
    "NEPA": ["1600", "83.8", "11.3 last, 14.1 mean", "48.3", "85.3", "", "54.0", "arXiv 2512.16922"],
    "MAE": ["1600", "83.6", "68.0", "48.1", "85.9", "75.8", "53.6", "arXiv 2111.06377"],
    "MoCo v3": ["300", "83.2", "", "47.3", "84.1", "", "49.1", "arXiv 2111.06377"],
    "BEiT": ["800", "83.2", "", "47.1", "85.2", "", "53.3", "arXiv 2111.06377; its tokenizer saw 250 M other images"],
    "DINO": ["", "82.8", "78.2", "", "", "", "", "arXiv 2111.06377; linear: DINO's README"],
    "iBOT": ["250 (L)", "84.0", "79.5", "50.0", "84.8", "81.0", "", "iBOT's README"],
    "data2vec": ["1600 (L)", "84.2", "", "", "86.6", "77.3", "", "arXiv 2202.03555; linear 2301.08243"],
    "I-JEPA": ["600", "", "72.9", "", "", "77.5", "", "arXiv 2301.08243, table 1"],
}


def published_table(runs: Sequence[Run]) -> Table:
    """Return the published numbers; without rows where no method of this package is compared."""
    rows = [[name, *cells] for name, cells in PUBLISHED.items()] if any(map(paper_of, runs)) else []
    note = (
        "Published elsewhere and not reproduced here: ImageNet-1K pretraining, ViT-B and L, 224 pixels, top-1 in per "
        "cent, UperNet's mIoU on ADE20K. NEPA's fine-tuned numbers are the best of 100 evaluations on the validation "
        "images; protocols on ADE20K differ in detail."
    )
    return Table("Published, not reproduced here", HEADER, rows, note)
