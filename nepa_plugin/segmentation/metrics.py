"""mmsegmentation's mean IoU, which says over how many classes it is a mean."""

from typing import Any

import torch
from mmengine.logging import print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class CountedIoUMetric(IoUMetric):
    """``IoUMetric`` with the same scores, and a line on the classes that they leave out.

    A class that is neither in a label nor in a prediction has no IoU, and mmsegmentation's mean leaves it out: two runs
    whose predictions differ may be means over different classes.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Return the scores in per cent.

        Args:
            results: For every image the pixels of every class: intersection, union, prediction, label.
        """
        metrics: dict[str, float] = super().compute_metrics(results)
        if self.format_only or not results:
            return metrics
        union = torch.stack([torch.as_tensor(result[1]) for result in results]).sum(dim=0)
        names: Any = self.dataset_meta["classes"]
        left_out = [name for name, pixels in zip(names, union.tolist(), strict=True) if not pixels]
        text = f"The mean IoU is over {len(names) - len(left_out)} of {len(names)} classes"
        if left_out:
            more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
            text += f"; in no label and no prediction: {', '.join(left_out[:8])}{more}"
        print_log(f"{text}.", logger="current")
        return metrics
