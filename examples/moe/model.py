"""A small decoder-style character model with Mixture-of-Experts layers, on a mesh ("expert", "tensor")."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from examples.moe import fp8_dispatch, layer, modes, text

VOCABULARY = 256  # bytes
DISPATCH = {
    "replicate": layer.moe_replicate,
    "all_to_all": layer.moe_all_to_all,
    "fp8_all_to_all": fp8_dispatch.moe,
}
FP8_DISPATCH_MODE = "fp8-mlp-pow2"  # what it computes
AUXILIARY = 0.01  # weight of the loss that keeps experts evenly loaded
HELD_OUT_BATCHES = 16


class Config(NamedTuple):
    """Sizes of the model and of a step, and how it is trained."""

    layers: int = 2
    features: int = 128
    hidden: int = 128
    heads: int = 4
    experts: int = 8
    top: int = 2
    batch: int = 8
    context: int = 64
    learning_rate: float = 2e-3
    warmup: int = 20

    def check(self, mesh: Mesh, microbatches: int = 1) -> None:
        """Raises if the mesh, or the number of microbatches, does not divide the sizes."""
        expert, tensor = mesh.shape["expert"], mesh.shape["tensor"]
        for name, axis in (("experts", expert), ("hidden", tensor), ("heads", tensor)):
            if getattr(self, name) % axis:
                raise ValueError(
                    f"--{name} {getattr(self, name)} must be a multiple of {axis}, as the mesh is {mesh.shape}."
                )
        if self.batch % (microbatches * expert):
            raise ValueError(
                f"--batch {self.batch} must be a multiple of {microbatches * expert}, of --microbatches "
                f"{microbatches} times {expert}, as the mesh is {mesh.shape}."
            )
        if self.features % self.heads:
            raise ValueError(f"--features {self.features} must be a multiple of --heads {self.heads}.")


SIZES = {
    "small": Config(),
    "gpu": Config(4, 512, 1024, heads=8, batch=16, context=256, learning_rate=6e-4, warmup=100),  # 50 M in experts
    "step": Config(2, 2048, 8192, heads=16, batch=32, context=512, learning_rate=2e-4),  # experts' products: most of it
}


def make_mesh(shape: tuple[int, ...]) -> Mesh:
    """The mesh, over the first devices if it needs fewer than there are."""
    count = int(np.prod(shape))
    return jax.make_mesh(shape, ("expert", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:count])


def specs(config: Config) -> dict:
    """How each parameter lies on the mesh."""
    block = {
        "qkv": P(None, None, "tensor", None),
        "out": P("tensor", None, None),
        "router": P(),
        "gate_up": P("expert", None, None, "tensor"),
        "down": P("expert", "tensor", None),
    }
    return {"embedding": P(), "position": P(), "head": P(), "layers": [dict(block) for _ in range(config.layers)]}


EXPERTS = ("gate_up", "down")  # weights of the experts in a layer


def split(params: dict) -> tuple[dict, list[dict]]:
    """All parameters but the experts', and those of every layer."""
    layers = params["layers"]
    others = [{name: leaf for name, leaf in block.items() if name not in EXPERTS} for block in layers]
    return params | {"layers": others}, [{name: block[name] for name in EXPERTS} for block in layers]


def merge(others: dict, experts: list[dict]) -> dict:
    """What `split` has split."""
    return others | {"layers": [block | own for block, own in zip(others["layers"], experts, strict=True)]}


def expert_specs(config: Config, mode: modes.Mode) -> dict:
    """As `specs`, of a layer's experts: their weights, sums of gradients and what the weights are quantized to."""
    weights = {name: specs(config)["layers"][0][name] for name in EXPERTS}
    into, out = P("expert", None, "tensor"), P("expert", "tensor", None)
    quantized = tuple(jax_tsq.BlockQuantized._make(each) for each in ((into, out, into), (out, into, out)))
    return weights | {"accumulate": weights, "quantized": None if mode.quantize is None else quantized}


@jax.named_scope("experts")
def quantize(experts: list[dict], config: Config, mesh: Mesh, mode: modes.Mode) -> list[dict]:
    """Every layer's weights with what they are quantized to, once a step."""
    if mode.quantize is None:
        return [block | {"quantized": None} for block in experts]
    spec = expert_specs(config, mode)
    run = jax.shard_map(
        mode.quantize,
        mesh=mesh,
        in_specs=({name: spec[name] for name in EXPERTS},),
        out_specs=spec["quantized"],
    )
    return [block | {"quantized": run(jax.lax.stop_gradient(block))} for block in experts]


def init(config: Config, key: jax.Array) -> dict:
    """Parameters in float32."""
    features, hidden, experts = config.features, config.hidden, config.experts
    head = features // config.heads

    def normal(name: int, *shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, name), shape) / fan_in**0.5

    def block(i: int) -> dict:
        name = 10 * (i + 1)
        return {
            "qkv": normal(name, features, 3, config.heads, head, fan_in=features),
            "out": normal(name + 1, config.heads, head, features, fan_in=features),
            "router": normal(name + 2, features, experts, fan_in=features),
            "gate_up": normal(name + 3, experts, features, 2, hidden, fan_in=features),
            "down": normal(name + 4, experts, hidden, features, fan_in=hidden),
        }

    return {
        "embedding": normal(0, VOCABULARY, features, fan_in=features),
        "position": normal(1, config.context, features, fan_in=features),
        "head": normal(2, features, VOCABULARY, fan_in=features),
        "layers": [block(i) for i in range(config.layers)],
    }


def rms_norm(x: jax.Array) -> jax.Array:
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)


@jax.named_scope("attention")
def attention(params: dict, x: jax.Array) -> jax.Array:
    """Causal attention over `[batch, context, features]`, heads split over "tensor"."""
    q, k, v = jnp.einsum("btd,dshe->sbthe", x, params["qkv"].astype(x.dtype))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jnp.einsum("bthe,hed->btd", y, params["out"].astype(x.dtype), preferred_element_type=jnp.float32)


def route(router: jax.Array, x: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The chosen experts and their weights, the tokens of each expert, and the loss for an uneven load."""
    probabilities = jax.nn.softmax(x.astype(jnp.float32) @ router)
    weights, chosen = jax.lax.top_k(probabilities, top)
    load = jnp.bincount(chosen.ravel(), length=router.shape[1])
    uneven = router.shape[1] * jnp.sum(load / chosen.size * jnp.mean(probabilities, axis=0))
    return chosen.astype(jnp.int32), weights / weights.sum(axis=-1, keepdims=True), load, uneven


def forward(
    others: dict, experts: list[dict], inputs: jax.Array, *, config, mesh: Mesh, mode: modes.Mode, dispatch: str
):
    """Logits `[batch, context, VOCABULARY]`, the tokens of each expert `[layers, experts]`, and the auxiliary loss."""
    spec = expert_specs(config, mode)
    moe = jax.shard_map(
        functools.partial(DISPATCH[dispatch], experts=jax.named_scope("experts")(mode.experts)),
        mesh=mesh,
        in_specs=({name: spec[name] for name in experts[0]}, P("expert"), P("expert"), P("expert")),
        out_specs=P("expert"),
        check_vma=mesh.size > 1,  # which Pallas kernels do not pass, that are taken on one device
    )
    x = others["embedding"][inputs] + others["position"]
    loads, auxiliary = [], 0.0
    for block, weights_here in zip(others["layers"], experts, strict=True):
        x = x + attention(block, rms_norm(x))
        tokens = rms_norm(x).reshape(-1, config.features)
        chosen, weights, load, uneven = route(block["router"], tokens, config.top)
        with jax.named_scope("dispatch"):
            x = x + moe(weights_here, tokens, chosen, weights).reshape(x.shape)
        loads.append(load)
        auxiliary += uneven
    logits = jnp.einsum(
        "btd,dv->btv", rms_norm(x), others["head"].astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    return logits, jnp.stack(loads), auxiliary


def losses(others: dict, experts: list[dict], batch: jax.Array, **how):
    """What training minimizes, and the loss per byte with the tokens of each expert.

    Args:
        others, experts: of `split`, the latter with `quantize` applied.
    """
    logits, loads, auxiliary = forward(others, experts, batch[..., :-1], **how)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[..., 1:]).mean()
    return loss + AUXILIARY * auxiliary, (loss, loads)


def gradients(params: dict, batches: jax.Array, *, config: Config, mesh: Mesh, mode: modes.Mode, dispatch: str):
    """Of the mean of all microbatches `[microbatches, batch, context + 1]`; with the loss, and tokens of each expert.

    The sums are float32. Where weights are quantized, they are once for all microbatches, and the kernels of the weight
    gradients add to the sums in place.
    """
    how = dict(config=config, mesh=mesh, mode=mode, dispatch=dispatch)
    others, experts = split(params)
    ready = quantize(experts, config, mesh, mode)
    count = len(batches)

    def loss(others, targets, batch):
        """`targets` are what gets the gradients of the experts' weights."""
        name = "accumulate" if count > 1 and mode.quantize is not None else None
        blocks = [block | ({name: one} if name else one) for block, one in zip(ready, targets, strict=True)]
        loss, metrics = losses(others, blocks, batch, **how)
        return loss / count, metrics

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    if count == 1:
        (of_others, of_experts), metrics = gradient(others, experts, batches[0])
        return merge(of_others, of_experts), metrics

    def add(sums, batch):
        of_others, of_experts = sums
        if mode.quantize is None:
            new, metrics = gradient(others, experts, batch)
            return jax.tree.map(jnp.add, sums, new), metrics
        (new, of_experts), metrics = gradient(others, of_experts, batch)
        return (jax.tree.map(jnp.add, of_others, new), of_experts), metrics

    sums, (loss_of_each, loads) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (others, experts)), batches)
    return merge(*sums), (loss_of_each.mean(), loads.sum(axis=0))


def sample(
    characters: jax.Array, key: jax.Array, config: Config, mesh: Mesh, microbatches: int = 1, reverse: bool = False
) -> jax.Array:
    """A batch of random passages `[microbatches, batch / microbatches, context + 1]`, split over "expert".

    With `reverse` the last passage comes first.
    """
    starts = jax.random.randint(key, (config.batch,), 0, characters.size - config.context)
    starts = (starts[::-1] if reverse else starts).reshape(microbatches, -1)
    passages = characters[starts[..., None] + jnp.arange(config.context + 1)].astype(jnp.int32)
    return jax.lax.with_sharding_constraint(passages, NamedSharding(mesh, P(None, "expert")))


class Metrics(NamedTuple):
    """Of every step: the loss per byte, the norm of all gradients, the tokens of each expert of each layer."""

    losses: jax.Array
    norms: jax.Array
    loads: jax.Array


class Trainer:
    """Training in one mode on one mesh, compiled for any seed and routing."""

    def __init__(self, config: Config, mesh: Mesh, mode: str, dispatch: str, microbatches: int = 1):
        config.check(mesh, microbatches)
        if dispatch == "fp8_all_to_all" and mode != FP8_DISPATCH_MODE:
            raise ValueError(
                f"--dispatch fp8_all_to_all needs --modes {FP8_DISPATCH_MODE}, whose products it computes; got {mode}."
            )
        self.config, self.mesh, self.mode, self.microbatches = config, mesh, modes.MODES[mode], microbatches
        self.how: dict[str, Any] = dict(config=config, mesh=mesh, mode=self.mode, dispatch=dispatch)
        self.optimizer = optax.adamw(optax.linear_schedule(0, config.learning_rate, config.warmup), weight_decay=0.01)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(config))
        everywhere = NamedSharding(mesh, P())
        self.text, self.held_out = jax.device_put((text.read().training, text.read().held_out), everywhere)
        # Moments lie like their parameters.
        state = jax.eval_shape(self._init, jax.random.key(0))
        optimizer = optax.tree_map_params(
            self.optimizer, lambda _, s: s, state[1], shardings, transform_non_params=lambda _: everywhere
        )
        self.state_shardings = (shardings, optimizer)
        self.state = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state, self.state_shardings
        )
        self.init = jax.jit(self._init, out_shardings=self.state_shardings)
        self.jitted = jax.jit(
            self._steps,
            static_argnames="count",
            out_shardings=(self.state_shardings, everywhere),
            donate_argnums=0,
        )
        self._evaluate = jax.jit(self._losses_held_out, out_shardings=everywhere)
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def _init(self, key: jax.Array):
        params = init(self.config, key)
        return params, self.optimizer.init(params)

    def compiled(self, count: int) -> jax.stages.Compiled:
        """So many steps as one program of a state, the text, a seed's key and the number of the first step."""
        if count not in self._compiled:
            abstract = self.state, self.text, jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32)
            self._compiled[count] = self.jitted.lower(*abstract, count=count).compile()
        return self._compiled[count]

    def steps(self, state: Any, key: jax.Array, first: int, count: int) -> tuple[Any, Metrics]:
        """Goes on from a state, which it takes away."""
        return self.compiled(count)(state, self.text, key, np.int32(first))

    def evaluate(self, state: Any) -> float:
        """The loss per byte of text that nothing is trained on, the same passages for every mode."""
        return float(self._evaluate(state[0], self.held_out))

    def _steps(self, state: Any, characters: jax.Array, key: jax.Array, first: jax.Array, *, count: int):
        return jax.lax.scan(
            lambda state, i: self._step(state, characters, jax.random.fold_in(key, i)), state, first + jnp.arange(count)
        )

    def _step(self, state: Any, characters: jax.Array, key: jax.Array) -> tuple[Any, Metrics]:
        params, optimizer = state
        batches = sample(characters, key, self.config, self.mesh, self.microbatches, self.mode.reverse)
        gradient, (loss, loads) = gradients(params, batches, **self.how)
        with jax.named_scope("optimizer"):
            updates, optimizer = self.optimizer.update(gradient, optimizer, params)
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))
            params = optax.apply_updates(params, updates)
        return (params, optimizer), Metrics(loss, norm, loads)

    def _losses_held_out(self, params: dict, characters: jax.Array) -> jax.Array:
        others, experts = split(params)
        experts = quantize(experts, self.config, self.mesh, self.mode)

        def loss(i):
            batches = sample(characters, jax.random.fold_in(jax.random.key(0), i), self.config, self.mesh)
            return losses(others, experts, batches[0], **self.how)[1][0]

        return jax.lax.map(loss, jnp.arange(HELD_OUT_BATCHES)).mean()
