"""The tiny model fixtures as data: one `Case` for each folder of `shard/tests/fixtures/`.

A case is a `config.json` written the way models of that family are published, plus what must be
shown to matter: each ablation switches one feature off and has to change the logits.

Deliberately no code here that computes anything: `fixtures.py` makes the weights and references.

Invariant: between them the cases cover every field of the decoder's shape, three stored types, both
dialects of rotary parameters (`rope_theta` with `rope_scaling`, and `rope_parameters`) and both
names of the stored type (`torch_dtype`, `dtype`).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ablation:
    """One feature switched off: keys set in the configuration, or tensors overwritten.

    `config` replaces top-level keys. `tensors` maps the end of a tensor's name to the value that
    fills it. `first_position` is the first prompt position whose logits may change.
    """

    label: str
    config: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    first_position: int = 0


@dataclass(frozen=True)
class Case:
    """One fixture: folder name, why it exists, published-style configuration, files, seed."""

    name: str
    covers: str
    config: dict
    ablations: tuple[Ablation, ...]
    seed: int
    files: int = 1
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    generation: dict = field(default_factory=dict)


def decoder(architecture, model_type, hidden, intermediate, heads, kv_heads, vocab, **more):
    """The keys that every family has; `more` adds or overrides, in the given order."""
    config = {
        "architectures": [architecture],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 256,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab,
    }
    config.update(more)
    return config


def llama(*sizes, **more):
    return decoder("LlamaForCausalLM", "llama", *sizes, **more)


def qwen2(*sizes, **more):
    return decoder("Qwen2ForCausalLM", "qwen2", *sizes, rms_norm_eps=1e-6, **more)


def qwen3(*sizes, **more):
    return decoder("Qwen3ForCausalLM", "qwen3", *sizes, rms_norm_eps=1e-6, **more)


def gemma(architecture, model_type, *sizes, **more):
    """What Gemma 2 and 3 share. Published files say nothing of tied embeddings: they are the default."""
    config = decoder(architecture, model_type, *sizes, hidden_activation="gelu_pytorch_tanh",
                     attention_bias=False, rms_norm_eps=1e-6, sliding_window=16, **more)
    return {key: value for key, value in config.items() if key not in UNSAID}


# Keys of the other families that Gemma's files do not have.
UNSAID = ("hidden_act", "tie_word_embeddings")


def gemma2(*sizes, **more):
    return gemma("Gemma2ForCausalLM", "gemma2", *sizes, **more)


def gemma3(*sizes, **more):
    return gemma("Gemma3ForCausalLM", "gemma3_text", *sizes, **more)


def no_scaling(theta):
    """Plain rotary embedding, whichever dialect the configuration was written in."""
    return {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
QWEN3_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "attention_factor": 1.3,
    "truncate": False,
}


def yarn_with(**changes):
    """`QWEN3_YARN` with one of its parameters at another value."""
    return {"rope_parameters": QWEN3_YARN | changes}


GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}


def gemma3_rope_with(kind, **changes):
    """`GEMMA3_ROPE` with one layer type's parameters changed."""
    return {"rope_parameters": GEMMA3_ROPE | {kind: GEMMA3_ROPE[kind] | changes}}


QWEN_BIASES = {"q_proj.bias": 0.0, "k_proj.bias": 0.0, "v_proj.bias": 0.0}
QWEN3_NORMS = {"q_norm.weight": 1.0, "k_norm.weight": 1.0}
# What Gemma stores is the distance from 1.
GEMMA3_NORMS = {"q_norm.weight": 0.0, "k_norm.weight": 0.0}

CASES = (
    Case(
        name="llama2",
        covers="multi-head attention, f16, older dialect with no rotary keys at all (base 10000)",
        config=llama(64, 96, 8, 8, 192, pretraining_tp=1, rope_scaling=None,
                     torch_dtype="float16"),
        ablations=(Ablation("rotary base", no_scaling(100.0), first_position=1),),
        seed=2,
    ),
    Case(
        name="llama3",
        covers="8 query and 2 KV heads (replicated at 4 and 8), base 500000, bf16, two files and an"
        " index, a list of end tokens",
        config=llama(64, 128, 8, 2, 256, attention_bias=False, rope_scaling=None,
                     rope_theta=500000.0, torch_dtype="bfloat16"),
        ablations=(Ablation("rotary base", {"rope_theta": 10000.0}, first_position=1),),
        seed=3,
        files=2,
        generation={"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    Case(
        name="llama31",
        covers="`llama3` scaling in the older dialect, own head size, tied embeddings, bf16",
        config=llama(64, 96, 8, 2, 256, head_dim=16, attention_bias=False, mlp_bias=False,
                     rope_scaling=LLAMA31_SCALING, rope_theta=10000.0, tie_word_embeddings=True,
                     torch_dtype="bfloat16"),
        ablations=(Ablation("llama3 scaling", no_scaling(10000.0), first_position=1),),
        seed=31,
    ),
    Case(
        name="llama-linear",
        covers="linear scaling under the oldest key `type`, vocabulary of 259, f16",
        config=llama(64, 96, 8, 4, 259, rope_scaling={"type": "linear", "factor": 4.0},
                     rope_theta=10000.0, torch_dtype="float16"),
        ablations=(Ablation("linear scaling", no_scaling(10000.0), first_position=1),),
        seed=5,
    ),
    Case(
        name="llama-yarn",
        covers="YaRN in the newer dialect, attention factor derived from the stretch, bf16",
        config=llama(64, 96, 8, 4, 192, head_dim=16, dtype="bfloat16", max_position_embeddings=128,
                     rope_parameters=YARN),
        ablations=(
            Ablation("yarn scaling", no_scaling(10000.0)),
            Ablation("attention factor", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
        ),
        seed=6,
    ),
    Case(
        name="llama-odd",
        covers="6 query and 3 KV heads (splits 3 ways), every projection with a bias, intermediate"
        " size that 8 does not divide, f32, vocabulary of 193",
        config=llama(48, 78, 6, 3, 193, attention_bias=True, mlp_bias=True, rope_scaling=None,
                     rope_theta=10000.0, torch_dtype="float32"),
        ablations=(
            Ablation("q, k, v biases", tensors=QWEN_BIASES),
            Ablation("output bias", tensors={"o_proj.bias": 0.0}),
            Ablation("feed-forward biases",
                     tensors={"gate_proj.bias": 0.0, "up_proj.bias": 0.0, "down_proj.bias": 0.0}),
        ),
        seed=7,
        tensor_parallel=(1, 3),
    ),
    Case(
        name="llama-uneven",
        covers="intermediate size 101 and vocabulary 131, divisible by neither 2, 3 nor 8; f32;"
        " newer dialect with the default rotary type",
        config=llama(48, 101, 8, 4, 131, head_dim=8, dtype="float32",
                     rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
        ablations=(Ablation("rotary base", no_scaling(100.0), first_position=1),),
        seed=8,
    ),
    Case(
        name="mistral",
        covers="sliding window of 16, shorter than the prompt; own head size; bf16; older dialect",
        config=decoder("MistralForCausalLM", "mistral", 64, 112, 8, 2, 256, head_dim=8,
                       rope_theta=1000000.0, sliding_window=16, torch_dtype="bfloat16"),
        ablations=(Ablation("sliding window", {"sliding_window": None}, first_position=16),),
        seed=9,
    ),
    Case(
        name="mistral-full",
        covers="`sliding_window: null`, as later releases have it; f16; newer dialect",
        config=decoder("MistralForCausalLM", "mistral", 48, 96, 8, 4, 258, head_dim=8,
                       sliding_window=None, dtype="float16",
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        ablations=(Ablation("full attention", {"sliding_window": 16}, first_position=16),),
        seed=10,
    ),
    Case(
        name="qwen2",
        covers="q, k and v biases, tied embeddings, f16, older dialect with a window that is"
        " switched off (`use_sliding_window: false`)",
        config=qwen2(64, 128, 8, 2, 256, max_window_layers=1, rope_theta=1000000.0,
                     sliding_window=16, use_sliding_window=False, tie_word_embeddings=True,
                     torch_dtype="float16"),
        ablations=(
            Ablation("q, k, v biases", tensors=QWEN_BIASES),
            Ablation("window off", {"use_sliding_window": True}, first_position=16),
        ),
        seed=11,
    ),
    Case(
        name="qwen25",
        covers="untied head, biases, vocabulary of 259, bf16, newer dialect with layer types",
        config=qwen2(64, 100, 8, 4, 259, dtype="bfloat16", max_window_layers=2,
                     layer_types=["full_attention", "full_attention"], sliding_window=None,
                     rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
                     use_sliding_window=False),
        ablations=(Ablation("q, k, v biases", tensors=QWEN_BIASES),),
        seed=25,
        generation={"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.7, "top_k": 20,
                    "top_p": 0.8, "repetition_penalty": 1.05},
    ),
    Case(
        name="qwen3",
        covers="norm over each query and key head with random weights, head size 24 with a hidden"
        " size of 64, tied embeddings, bf16, older dialect",
        config=qwen3(64, 96, 8, 4, 256, attention_bias=False, head_dim=24, max_window_layers=2,
                     rope_scaling=None, rope_theta=1000000, sliding_window=None,
                     use_sliding_window=False, tie_word_embeddings=True, torch_dtype="bfloat16"),
        ablations=(Ablation("q, k norm weights", tensors=QWEN3_NORMS),),
        seed=30,
    ),
    Case(
        name="qwen3-yarn",
        covers="YaRN with a stated attention factor and no rounding of its range, a window on the"
        " last layer only, two files and an index, newer dialect, f16",
        config=qwen3(48, 96, 8, 2, 192, attention_bias=False, dtype="float16", head_dim=16,
                     layer_types=["full_attention", "sliding_attention"],
                     max_position_embeddings=512, max_window_layers=1, rope_parameters=QWEN3_YARN,
                     sliding_window=16, use_sliding_window=True),
        ablations=(
            Ablation("yarn scaling", no_scaling(10000.0)),
            Ablation("attention factor", yarn_with(attention_factor=1.0)),
            Ablation("truncate", yarn_with(truncate=True)),
            Ablation("beta_fast", yarn_with(beta_fast=32.0)),
            Ablation("beta_slow", yarn_with(beta_slow=1.0)),
            Ablation("window on the last layer",
                     {"use_sliding_window": False, "layer_types": None}, first_position=16),
        ),
        seed=32,
        files=2,
    ),
    Case(
        name="gemma2",
        covers="soft caps on attention scores and on logits, norms after attention and feed-forward"
        " layer and norm weights stored as the distance from 1, tanh-GELU, scaled embedding, window on"
        " every other layer, a scale of attention that is not the head size's, tied embeddings by"
        " default, older dialect, bf16",
        config=gemma2(64, 96, 8, 2, 256, head_dim=16, attn_logit_softcapping=2.0,
                      final_logit_softcapping=10.0, query_pre_attn_scalar=24, rope_theta=10000.0,
                      hidden_act="gelu_pytorch_tanh", torch_dtype="bfloat16"),
        ablations=(
            Ablation("attention soft cap", {"attn_logit_softcapping": None}, first_position=1),
            Ablation("logit soft cap", {"final_logit_softcapping": None}),
            Ablation("attention scale", {"query_pre_attn_scalar": 16}, first_position=1),
            Ablation("activation", {"hidden_activation": "silu"}),
            Ablation("window", {"layer_types": ["full_attention"] * 2}, first_position=16),
            Ablation("window on the other layer",
                     {"layer_types": ["full_attention", "sliding_attention"]}, first_position=16),
            Ablation("norms' offset", tensors={"post_attention_layernorm.weight": -0.5}),
        ),
        seed=41,
    ),
    Case(
        name="gemma2-odd",
        covers="6 query and 3 KV heads (splits 3 ways), a hidden size whose root is not a whole number,"
        " no attention soft cap (`null`), layer types in the newer dialect, untied head, f32",
        config=gemma2(48, 78, 6, 3, 193, head_dim=8, attn_logit_softcapping=None,
                      final_logit_softcapping=40.0, query_pre_attn_scalar=8, dtype="float32",
                      layer_types=["full_attention", "sliding_attention"],
                      rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        | {"tie_word_embeddings": False},
        ablations=(
            Ablation("logit soft cap", {"final_logit_softcapping": None}),
            Ablation("window", {"layer_types": ["full_attention"] * 2}, first_position=16),
        ),
        seed=42,
        tensor_parallel=(1, 3, 6),
    ),
    Case(
        name="gemma3",
        covers="4 query heads and one KV head, norm over each query and key head, bases of its own for"
        " local and global layers, linear scaling of the global ones, a window on two of three layers by"
        " `sliding_window_pattern`, no soft caps, older dialect, vocabulary of 262, bf16",
        config=gemma3(64, 96, 4, 1, 262, head_dim=24, num_hidden_layers=3,
                      attn_logit_softcapping=None, final_logit_softcapping=None,
                      query_pre_attn_scalar=24, rope_local_base_freq=1000.0, rope_theta=10000.0,
                      rope_scaling={"rope_type": "linear", "factor": 8.0},
                      sliding_window_pattern=3, torch_dtype="bfloat16"),
        ablations=(
            Ablation("local base", {"rope_local_base_freq": 10000.0}, first_position=1),
            Ablation("global base", {"rope_theta": 100.0}, first_position=1),
            Ablation("linear scaling", {"rope_scaling": None}, first_position=1),
            Ablation("pattern", {"sliding_window_pattern": 2}, first_position=1),
            Ablation("q, k norm weights", tensors=GEMMA3_NORMS),
        ),
        seed=43,
        tensor_parallel=(1, 2, 4),
        generation={"eos_token_id": [2, 5], "do_sample": True, "top_k": 64, "top_p": 0.95},
    ),
    Case(
        name="gemma3-types",
        covers="8 query and 4 KV heads, rotary parameters by layer type in the newer dialect, layer"
        " types, f16",
        config=gemma3(64, 80, 8, 4, 192, head_dim=16, attn_logit_softcapping=None,
                      final_logit_softcapping=None, query_pre_attn_scalar=16, dtype="float16",
                      layer_types=["sliding_attention", "full_attention"],
                      rope_parameters=GEMMA3_ROPE),
        ablations=(
            Ablation("local base", gemma3_rope_with("sliding_attention", rope_theta=50000.0),
                     first_position=1),
            Ablation("global scaling", gemma3_rope_with("full_attention", factor=1.0),
                     first_position=1),
            Ablation("window", {"sliding_window": 64}, first_position=16),
        ),
        seed=44,
    ),
)
