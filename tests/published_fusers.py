"""Fusers in the format of nics-efc/C2C_Fuser, written from its description with random weights."""

import json

import torch
from torch import nn


class Block(nn.Module):
    """x + w2 GELU(w1 RMSNorm(x)), under the published names."""

    def __init__(self, width, inner):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.w1, self.w2 = (nn.Linear(*s, bias=False) for s in ((width, inner), (inner, width)))

    def forward(self, x):
        return x + self.w2(nn.functional.gelu(self.w1(self.norm(x))))


class PublishedProjector(nn.Module):
    """A published projector, written from its description: keys and values of one layer."""

    def __init__(self, receiver, sharer, hidden=12, inner=20, layers=4):
        super().__init__()
        size, inputs = receiver.heads * receiver.head_dim, sharer.heads * sharer.head_dim
        self.heads = receiver.heads
        self.register_buffer("gate_temperature", torch.tensor(1.0))
        for kind in ("key", "value"):
            stack = lambda inner, count=1: nn.ModuleDict(
                {"blocks": nn.Sequential(*(Block(hidden, inner) for _ in range(count)))}
            )
            parts = {
                "in": nn.Linear(inputs + size, hidden),
                "mlp1": stack(inner),
                "scalar_mlp2": stack(hidden),
                "scalar_head": nn.Linear(hidden, receiver.heads),
                "proj_mlp2": stack(inner, layers - 2),
                "proj_out": nn.Linear(hidden, size),
            }
            for name, module in parts.items():
                self.add_module(f"{kind}_{name}", module)
            self.register_parameter(f"{kind}_gate_logit", nn.Parameter(torch.tensor(0.5)))
        for parameter in self.parameters():
            if parameter.ndim:
                nn.init.normal_(parameter, std=0.4)
        names = "target_num_heads target_dim source_num_heads source_dim".split()
        self.arguments = dict(zip(names, [*receiver[1:], *sharer[1:]], strict=True))
        self.arguments |= {"hidden_dim": hidden, "intermediate_dim": inner, "num_layers": layers}

    def forward(self, kind, source, target):  # (B, H, T, d)
        part = lambda name: getattr(self, f"{kind}_{name}")
        x = torch.cat([y.transpose(1, 2).flatten(2) for y in (source, target)], -1)
        x = part("mlp1")["blocks"](part("in")(x))
        scalar = part("scalar_head")(part("scalar_mlp2")["blocks"](x)).sigmoid()
        change = part("proj_out")(part("proj_mlp2")["blocks"](x)).unflatten(-1, (self.heads, -1))
        change = (scalar[..., None] * change).transpose(1, 2)
        return target + (part("gate_logit") > 0) * change


def write_published(folder, receiver, sharer, layers):
    """Write three projectors in the published format; the last has a closed gate for keys.

    Args:
        layers: {receiver layer: [[sharer layer, projector], ...]}.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    projectors = [PublishedProjector(receiver, sharer) for _ in range(3)]
    projectors[2].key_gate_logit.data.fill_(-0.1)
    for i, projector in enumerate(projectors):
        torch.save(projector.state_dict(), folder / f"projector_{i}.pt")
        config = {"class": "C2CProjector", "init_args": projector.arguments}
        (folder / f"projector_{i}.json").write_text(json.dumps(config))
    config = {"0": {"1": {str(layer): pairs for layer, pairs in layers.items()}}}
    (folder / "projector_config.json").write_text(json.dumps(config))
    return projectors
