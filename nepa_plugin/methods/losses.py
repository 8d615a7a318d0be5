"""Two of lightly's losses without what makes the host wait for the device: an index by a mask.

How many elements a mask has is only known when the device has computed it, and until then nothing more is queued.
"""

import torch
from lightly.loss import IBOTPatchLoss, NTXentLoss
from lightly.utils import dist
from torch import Tensor
from torch.nn import functional as F


class NTXent(NTXentLoss):
    """The normalised, temperature-scaled cross entropy of SimCLR, without a memory bank.

    lightly takes an image's similarity to itself out of the logits; here it stays, as minus infinity.
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss of the projections (B, D) of two views, with those of all processes as negatives."""
        views = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        several = self.gather_distributed and dist.world_size() > 1
        everything = [torch.cat(dist.gather(view), 0) if several else view for view in views]
        logits = torch.cat(views) @ torch.cat(everything).T / self.temperature  # (2 B, 2 M)
        batch, images = len(out0), len(everything[0])
        first = dist.rank() * batch if several else 0
        place = torch.arange(first, first + batch, device=out0.device)
        itself = torch.arange(2 * images, device=out0.device) == torch.cat([place, place + images])[:, None]
        return F.cross_entropy(logits.masked_fill(itself, -torch.inf), torch.cat([place + images, place]))


class PatchLoss(IBOTPatchLoss):
    """iBOT's loss of masked patches; it gets their weights, which lightly looks up in the mask."""

    def forward(  # type: ignore[override]
        self, teacher_out: Tensor, student_out: Tensor, weights: Tensor, teacher_temp: float
    ) -> Tensor:
        """Return the weighted sum of the patches' cross entropies, and update the center.

        Args:
            teacher_out: The teacher's logits of the masked patches, (M, K).
            student_out: The student's, (M, K).
            weights: Weight of each patch, (M,): one over the images and over the masked patches in its image.
            teacher_temp: Temperature of the teacher.

        Returns:
            The loss.
        """
        targets = F.softmax((teacher_out - self.center.value) / teacher_temp, dim=-1)
        entropies = -(targets * F.log_softmax(student_out / self.student_temp, dim=-1)).sum(dim=-1)
        self.center.update(teacher_out)
        return (entropies * weights).sum()
