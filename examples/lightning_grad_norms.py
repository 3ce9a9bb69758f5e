"""A Lightning callback that logs how hard the batches are: quantiles of the per-sample gradient norms of every n-th training batch.

    trainer = Trainer(callbacks=[GradNorms(every=50)])

Batches are (images, class numbers); `net` names the attribute of your LightningModule that is the classifier, None is the module itself.
"""

import torch
from lightning.pytorch import Callback

from infoutil_fast import grad_norms


class GradNorms(Callback):
    def __init__(self, every=50, layers="last", net=None):
        self.every, self.layers, self.net = every, layers, net  # layers="all" costs a backward pass, "last" a forward pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % self.every:
            return
        images, targets = batch
        model = getattr(pl_module, self.net) if self.net else pl_module
        norms = grad_norms(model, images.detach(), targets, layers=self.layers)  # in eval mode, and back to the mode it was in
        low, middle, high = torch.quantile(norms, norms.new_tensor([0.1, 0.5, 0.9])).tolist()
        pl_module.log_dict({"grad_norm/p10": low, "grad_norm/p50": middle, "grad_norm/p90": high})
