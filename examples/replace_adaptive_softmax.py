"""A trained model with nn.AdaptiveLogSoftmaxWithLoss: the same outputs from the fused one, and what that one adds."""

import torch
from torch import nn

from cprec_kernels.nn import ClusteredSoftmaxWithLoss


class Model(nn.Module):
    """Any model that ends in an adaptive softmax."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(32, 64)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(64, 10_000, cutoffs=[500, 2_000])


model = Model()  # trained; its checkpoint is model.state_dict()
checkpoint = model.state_dict()
features, target = torch.randn(256, 32), torch.randint(10_000, (256,))
before = model.softmax(model.encoder(features), target)

model.softmax = ClusteredSoftmaxWithLoss.from_adaptive(model.softmax)  # the one line
after = model.softmax(model.encoder(features), target)
torch.testing.assert_close(after.output, before.output)
torch.testing.assert_close(after.loss, before.loss)

model.load_state_dict(checkpoint)  # checkpoints written before the change go on loading

# What torch's module refuses: several dimensions, ignored targets, an empty batch, the best items without all scores.
hidden = torch.randn(8, 20, 64)
targets = torch.randint(10_000, (8, 20)).masked_fill(torch.rand(8, 20) < 0.1, -100)
loss = model.softmax(hidden, targets).loss
scores, items = model.softmax.topk(hidden[:, -1], k=10)
print(f"loss {loss:.3f}, empty batch {model.softmax(hidden[:0], targets[:0]).loss:.1f}, items {tuple(items.shape)}")

back = model.softmax.to_adaptive()  # torch's own module again
torch.testing.assert_close(back.log_prob(hidden[:, -1]), model.softmax.log_prob(hidden[:, -1]))
