"""What the methods are called, which kind they are of, and where to read of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from nepa_plugin.comparison.plan import UNTRAINED, Run


@dataclass(frozen=True)
class Paper:
    """A method's name and paper.

    Attributes:
        label: What the method is called.
        family: What kind of method it is.
        arxiv: The paper's number, or ``""`` where it is elsewhere.
        title: Of the paper.
        authors: As BibTeX has them.
        venue: Where a paper without a number was published, and the year.
    """

    label: str
    family: str
    arxiv: str
    title: str
    authors: str
    venue: tuple[str, int] | None = None

    @property
    def year(self) -> int:
        """The year of the paper."""
        return self.venue[1] if self.venue else 2000 + int(self.arxiv[:2])

    @property
    def key(self) -> str:
        """The BibTeX key."""
        name = self.authors.split(",")[0].lower().replace(" ", "").replace("-", "")
        return f"{name}{self.year}{self.label.lower().replace(' ', '').replace('-', '')}"

    def bibtex(self) -> str:
        """Return the BibTeX entry."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            "year": str(self.year),
        }
        if self.venue:
            fields["booktitle"] = self.venue[0]
        else:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@{'inproceedings' if self.venue else 'misc'}{{{self.key},\n{lines}\n}}\n"


WHOLE, MASKED, NEXT = "whole images", "masked parts", "what comes next"
#: Classes of methods and what is known of them.
PAPERS: dict[str, Paper] = {
    "NEPA": Paper(
        "NEPA",
        NEXT,
        "2512.16922",
        "Next-Embedding Prediction Makes Strong Vision Learners",
        "Xu, Sihan and Ma, Ziqiao and Chai, Wenhao and Chen, Xuweiyi and Jin, Weiyang and Chai, Joyce and Xie, Saining "
        "and Yu, Stella X.",
    ),
    "AIM": Paper(
        "AIM",
        NEXT,
        "2401.08541",
        "Scalable Pre-training of Large Autoregressive Image Models",
        "El-Nouby, Alaaeldin and others",
    ),
    "IGPT": Paper(
        "iGPT",
        NEXT,
        "",
        "Generative Pretraining from Pixels",
        "Chen, Mark and Radford, Alec and Child, Rewon and Wu, Jeffrey and Jun, Heewoo and Luan, David and Sutskever, "
        "Ilya",
        ("International Conference on Machine Learning", 2020),
    ),
    "CPC": Paper(
        "CPC",
        NEXT,
        "1807.03748",
        "Representation Learning with Contrastive Predictive Coding",
        "van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol",
    ),
    "BEiT": Paper(
        "BEiT",
        MASKED,
        "2106.08254",
        "BEiT: BERT Pre-Training of Image Transformers",
        "Bao, Hangbo and Dong, Li and Piao, Songhao and Wei, Furu",
    ),
    "MAE": Paper(
        "MAE",
        MASKED,
        "2111.06377",
        "Masked Autoencoders Are Scalable Vision Learners",
        "He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Dollar, Piotr and Girshick, Ross",
    ),
    "IJEPA": Paper(
        "I-JEPA",
        MASKED,
        "2301.08243",
        "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
        "Assran, Mahmoud and others",
    ),
    "IBOT": Paper(
        "iBOT",
        MASKED,
        "2111.07832",
        "iBOT: Image BERT Pre-Training with Online Tokenizer",
        "Zhou, Jinghao and others",
    ),
    "SimCLR": Paper(
        "SimCLR",
        WHOLE,
        "2002.05709",
        "A Simple Framework for Contrastive Learning of Visual Representations",
        "Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey",
    ),
    "MoCoV3": Paper(
        "MoCo v3",
        WHOLE,
        "2104.02057",
        "An Empirical Study of Training Self-Supervised Vision Transformers",
        "Chen, Xinlei and Xie, Saining and He, Kaiming",
    ),
    "SimSiam": Paper(
        "SimSiam",
        WHOLE,
        "2011.10566",
        "Exploring Simple Siamese Representation Learning",
        "Chen, Xinlei and He, Kaiming",
    ),
    "BYOL": Paper(
        "BYOL",
        WHOLE,
        "2006.07733",
        "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
        "Grill, Jean-Bastien and others",
    ),
    "DINO": Paper(
        "DINO",
        WHOLE,
        "2104.14294",
        "Emerging Properties in Self-Supervised Vision Transformers",
        "Caron, Mathilde and others",
    ),
    "LeJEPA": Paper(
        "LeJEPA",
        WHOLE,
        "2511.08544",
        "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics",
        "Balestriero, Randall and LeCun, Yann",
    ),
}


def paper_of(run: Run) -> Paper | None:
    """Return what is known of a run's method, if it is one of the package's."""
    return PAPERS.get(str(run.summary.get("method")))


def is_untrained(run: Run) -> bool:
    """Whether a row is a floor: fresh weights."""
    return run.name.startswith(UNTRAINED)


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return what each row is called, by its name: the method, with the row's name where several rows are of it."""
    first = {run.name: run for run in reversed(runs)}
    methods = {name: (paper.label if (paper := paper_of(run)) else name) for name, run in first.items()}
    several = {label for label in methods.values() if list(methods.values()).count(label) > 1}
    return {
        name: f"{methods[name]} ({name})" if methods[name] in several and methods[name] != name else methods[name]
        for name in dict.fromkeys(run.name for run in runs)
    }


def bibliography(runs: Sequence[Run]) -> str:
    """Return a BibTeX entry for each method of the comparison."""
    papers = {paper.key: paper for run in runs if (paper := paper_of(run))}
    return "\n".join(paper.bibtex() for paper in papers.values())
