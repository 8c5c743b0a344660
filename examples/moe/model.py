"""A small decoder-style character model with Mixture-of-Experts layers, on a mesh ("expert", "tensor")."""

import functools
import pydoc_data.topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.moe import layer

VOCABULARY = 128
AUXILIARY = 0.01  # weight of the loss that keeps experts evenly loaded


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

    def check(self, mesh: Mesh) -> None:
        """Raises if the mesh does not divide the sizes."""
        expert, tensor = mesh.shape["expert"], mesh.shape["tensor"]
        for name, axis in (("experts", expert), ("batch", expert), ("hidden", tensor), ("heads", tensor)):
            if getattr(self, name) % axis:
                raise ValueError(
                    f"--{name} {getattr(self, name)} must be a multiple of {axis}, as the mesh is {mesh.shape}."
                )
        if self.features % self.heads:
            raise ValueError(f"--features {self.features} must be a multiple of --heads {self.heads}.")


def make_mesh(shape: tuple[int, ...]) -> Mesh:
    """The mesh, over the first devices if it needs fewer than there are."""
    count = int(np.prod(shape))
    return jax.make_mesh(shape, ("expert", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:count])


def text(mesh: Mesh) -> jax.Array:
    """The reference manual of Python as ASCII, on every device."""
    characters = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    return jax.device_put(np.frombuffer(characters, np.uint8), NamedSharding(mesh, P()))


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


def forward(params: dict, inputs: jax.Array, *, config: Config, mesh: Mesh, experts: layer.Experts, dispatch: str):
    """Logits `[batch, context, VOCABULARY]`, the tokens of each expert `[layers, experts]`, and the auxiliary loss."""
    spec = specs(config)["layers"][0]
    moe = jax.shard_map(
        functools.partial(layer.DISPATCH[dispatch], experts=experts),
        mesh=mesh,
        in_specs=({name: spec[name] for name in ("gate_up", "down")}, P("expert"), P("expert"), P("expert")),
        out_specs=P("expert"),
    )
    x = params["embedding"][inputs] + params["position"]
    loads, auxiliary = [], 0.0
    for block in params["layers"]:
        x = x + attention(block, rms_norm(x))
        tokens = rms_norm(x).reshape(-1, config.features)
        chosen, weights, load, uneven = route(block["router"], tokens, config.top)
        weights_here = {name: block[name] for name in ("gate_up", "down")}
        x = x + moe(weights_here, tokens, chosen, weights).reshape(x.shape)
        loads.append(load)
        auxiliary += uneven
    logits = jnp.einsum(
        "btd,dv->btv", rms_norm(x), params["head"].astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    return logits, jnp.stack(loads), auxiliary


def losses(params: dict, batch: jax.Array, **how):
    """What training minimizes, and the loss per character with the tokens of each expert."""
    logits, loads, auxiliary = forward(params, batch[:, :-1], **how)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
    return loss + AUXILIARY * auxiliary, (loss, loads)


def sample(characters: jax.Array, key: jax.Array, config: Config, mesh: Mesh) -> jax.Array:
    """A batch of random passages `[batch, context + 1]`, split over "expert"."""
    starts = jax.random.randint(key, (config.batch,), 0, characters.size - config.context)
    passages = characters[starts[:, None] + jnp.arange(config.context + 1)].astype(jnp.int32)
    return jax.lax.with_sharding_constraint(passages, NamedSharding(mesh, P("expert")))


class Trainer:
    """Training in one mode on one mesh: two compiled functions, for any seed and routing."""

    def __init__(self, config: Config, mesh: Mesh, mode: str, dispatch: str, experts: layer.Experts | None = None):
        config.check(mesh)
        self.config, self.mesh = config, mesh
        self.experts: layer.Experts = layer.MODES[mode].experts
        self.how = dict(config=config, mesh=mesh, experts=self.experts, dispatch=dispatch)
        self.optimizer = optax.adamw(optax.linear_schedule(0, config.learning_rate, config.warmup), weight_decay=0.01)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(config))
        self.text = text(mesh)
        # Moments lie like their parameters.
        state = jax.eval_shape(self._init, jax.random.key(0))
        everywhere = NamedSharding(mesh, P())
        optimizer = optax.tree_map_params(
            self.optimizer, lambda _, s: s, state[1], shardings, transform_non_params=lambda _: everywhere
        )
        self.state_shardings = (shardings, optimizer)
        self.init = jax.jit(self._init, out_shardings=self.state_shardings)
        self.step = jax.jit(self._step, out_shardings=(self.state_shardings, everywhere), donate_argnums=0)

    def _init(self, key: jax.Array):
        params = init(self.config, key)
        return params, self.optimizer.init(params)

    def _step(self, state: Any, characters: jax.Array, key: jax.Array):
        """One step on random passages: the new state, and the loss with the tokens of each expert."""
        params, optimizer = state
        batch = sample(characters, key, self.config, self.mesh)
        gradients, metrics = jax.grad(losses, has_aux=True)(params, batch, **self.how)
        updates, optimizer = self.optimizer.update(gradients, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer), metrics
