"""Fine-tuning of few parameters, one kind of method a file. A method for the matrices of layers has

- `TARGETS`: patterns of the weights that get one where none are named (a dict of them by method, if it has several),
- `specs(c, site) -> {name: Spec}`: weights that one layer of a site adds,
- `bind(c, site, base, own, common, key) -> leaf`: what takes the weight's place while a model runs. A leaf has
  `einsum(eq, x, shard, *axes)` and `gathered(spec, shard)`; where it needs to, `after(y, shard)` (on the output with
  its bias), `beside(x, shard)` (besides an ffn), and `merged()` where one dense weight can do the same.
- Optionally `start(c, site, base, own) -> own` (first values made from the base's), `shared(c, sites) -> {name: Spec}`,
  and `FROZEN`, names of what is not trained.

At rest an adapter is a tree of its own beside the model's weights, under `adapter/`, with the paths of its sites.
Disabled is the base alone: nothing is ever subtracted.
"""

from types import ModuleType

from jaxlm.weights.adapters import bottleneck, ia3, low_rank, prefix

METHODS: dict[str, ModuleType] = {
    **dict.fromkeys(("lora", "dora", "pissa", "adalora", "vera"), low_rank),
    "ia3": ia3,
    **dict.fromkeys(("houlsby", "pfeiffer", "parallel"), bottleneck),
    "prefix": prefix,
}
