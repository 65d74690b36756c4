from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

from .base import ModelBase, TextModel, gguf, logger


@ModelBase.register("MegrezMoeForCausalLM")
@ModelBase.example("Infinigence/Megrez2-3x7B-A3B")
class MegrezMoeModel(TextModel):
    model_arch = gguf.MODEL_ARCH.MEGREZ_MOE

    # how tokenizer.ggml.pre = "megrez" splits text
    pre_regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        hparams = self.hparams

        # what config.json may leave out
        defaults = {
            "head_dim": hparams["hidden_size"] // hparams["num_attention_heads"],
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_shared_experts": 0,
            "norm_topk_prob": True,
            "num_key_value_heads": hparams["num_attention_heads"],
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 1.0,
            "scoring_func": "sigmoid",
            "topk_group": 1,
        }
        hparams.update({k: v for k, v in defaults.items() if hparams.get(k) is None})

        # experts_shared_frequency consecutive layers use one pool of experts, stored in the first of them
        lead = hparams["first_k_dense_replace"]
        freq = hparams["moe_layer_freq"]
        period = hparams["experts_shared_frequency"]
        moe_layers = [il for il in range(lead, self.block_count) if il % freq == 0]
        self._pool_layers = sorted({il - (il - lead) % period for il in moe_layers})
        if dense := [il for il in self._pool_layers if il not in moe_layers]:
            raise ValueError(
                f"moe_layer_freq = {freq} makes layers {dense} dense, which should hold the experts of their group"
            )

        self._experts: dict[int, dict[str, Tensor]] = {}

    def get_vocab_base_pre(self, tokenizer) -> str:
        # The hash knows one vocabulary; others of the family are split alike, as tokenizer.json says
        try:
            return super().get_vocab_base_pre(tokenizer)
        except NotImplementedError:
            if not self._is_megrez_pre_tokenizer():
                raise
            logger.info("gguf: tokenizer.json has the regex of the pre-tokenizer 'megrez'")
            return "megrez"

    def _is_megrez_pre_tokenizer(self) -> bool:
        tokenizer_file = self.dir_model / "tokenizer.json"
        if not tokenizer_file.is_file():
            return False
        with open(tokenizer_file, encoding="utf-8") as f:
            tokenizer = json.load(f)
        match tokenizer:
            case {
                "normalizer": None | {"type": "NFC"},
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": self.pre_regex},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                },
                "model": {"type": "BPE", **model},
            }:
                return not model.get("ignore_merges", False)
        return False

    def set_gguf_parameters(self):
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type == "yarn":
            self._set_gguf_yarn_parameters()
        elif rope_type not in ("default", "linear"):
            raise ValueError(f"Unsupported RoPE type: {rope_type}")

        super().set_gguf_parameters()
        hparams = self.hparams

        self.gguf_writer.add_vocab_size(hparams["vocab_size"])
        self.gguf_writer.add_rope_dimension_count(hparams["head_dim"])
        self.gguf_writer.add_leading_dense_block_count(hparams["first_k_dense_replace"])
        if hparams["moe_layer_freq"] != 1:
            self.gguf_writer.add_moe_every_n_layers(hparams["moe_layer_freq"])
        self.gguf_writer.add_experts_shared_frequency(hparams["experts_shared_frequency"])
        self.gguf_writer.add_expert_pre_gate(hparams["pre_gate"])
        self.gguf_writer.add_expert_feed_forward_length(hparams["moe_intermediate_size"])
        self.gguf_writer.add_expert_shared_count(hparams["n_shared_experts"])
        self.gguf_writer.add_expert_shared_feed_forward_length(
            hparams["n_shared_experts"] * hparams["moe_intermediate_size"]
        )
        self.gguf_writer.add_expert_weights_norm(hparams["norm_topk_prob"])
        self.gguf_writer.add_expert_weights_scale(hparams["routed_scaling_factor"])

    def _set_gguf_yarn_parameters(self):
        rope = self.rope_parameters
        if rope.get("mscale_all_dim") or rope.get("truncate") is False:
            raise ValueError("Unsupported RoPE: yarn with mscale_all_dim or without truncate")
        # DeepSeek's code scales by a lone mscale, transformers and vLLM do not
        if rope.get("mscale") not in (None, 1) and not rope.get("attention_factor"):
            raise ValueError("Unsupported RoPE: yarn with mscale and no attention_factor")

        # what rope_scaling may leave out, as in transformers
        defaults = {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": self.hparams["max_position_embeddings"],
        }
        rope.update({k: v for k, v in defaults.items() if rope.get(k) is None})

        # llama.cpp scales by 1 + 0.1 ln(factor) of its own accord, and by rope.scaling.attn_factor on top
        log_factor = 0.1 * math.log(rope["factor"])
        attn_factor = rope.pop("attention_factor", None) or 1.0 + log_factor
        self.gguf_writer.add_rope_scaling_attn_factors(attn_factor / (1.0 + log_factor))

    def modify_tensors(
        self, data_torch: Tensor, name: str, bid: int | None
    ) -> Iterable[tuple[str, Tensor]]:
        if name == "lm_head.weight" and self.hparams.get("tie_word_embeddings", False):
            logger.info("Skipping tied output layer 'lm_head.weight' (will use token_embd.weight)")
            return

        # skip Multi-Token Prediction (MTP) layers
        if (
            bid is not None
            and 0 <= bid - self.block_count < self.hparams["num_nextn_predict_layers"]
        ):
            logger.info(f"Skipping MTP tensor {name!r}")
            return

        # process the experts separately
        if ".mlp.experts." in name:
            assert bid is not None
            if bid not in self._pool_layers:
                raise ValueError(
                    f"Unexpected {name!r}: only layers {self._pool_layers} hold experts, the others share theirs"
                )

            n_experts = self.hparams["n_routed_experts"]
            experts = self._experts.setdefault(bid, {})
            experts[name] = data_torch
            if len(experts) < n_experts * 3:
                return

            # merge the experts into a single 3d tensor
            for w_name in ["down_proj", "gate_proj", "up_proj"]:
                enames = [
                    f"model.layers.{bid}.mlp.experts.{xid}.{w_name}.weight"
                    for xid in range(n_experts)
                ]
                merged = torch.stack([experts.pop(ename) for ename in enames], dim=0)
                yield from super().modify_tensors(
                    merged, f"model.layers.{bid}.mlp.experts.{w_name}.weight", bid
                )
            return

        yield from super().modify_tensors(data_torch, name, bid)

    def prepare_tensors(self):
        super().prepare_tensors()

        if experts := [name for pool in self._experts.values() for name in pool]:
            raise ValueError(f"Unprocessed experts: {experts}")
