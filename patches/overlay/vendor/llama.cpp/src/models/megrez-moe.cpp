#include "models.h"

#include "llama-expert-counts.h"
#include "llama-model-experts.h"

// Megrez2 (arXiv 2507.17728): a mixture-of-experts decoder in which
//  - a group of consecutive layers shares one pool of routed experts, stored with the group's first layer, and
//  - the router of a layer reads the *previous* layer's normalised FFN input (pre-gating), so a layer's experts are
//    known before the previous layer's FFN and its own attention run.
// Each layer keeps its own router, selection bias and shared experts.

bool llama_model_megrez_moe::is_moe(int il) const {
    return (uint32_t) il >= hparams.n_layer_dense_lead && il % hparams.moe_every_n_layers == 0;
}

int llama_model_megrez_moe::pool_layer(int il) const {
    const uint32_t lead   = hparams.n_layer_dense_lead;
    const uint32_t period = hparams.experts_shared_frequency;

    return is_moe(il) ? lead + (il - lead)/period*period : -1;
}

static std::string to_string(const std::vector<int> & layers) {
    std::string ret;
    for (const int il : layers) {
        ret += (ret.empty() ? "" : ", ") + std::to_string(il);
    }
    return ret.empty() ? "none" : ret;
}

void llama_model_megrez_moe::load_arch_hparams(llama_model_loader & ml) {
    const int n_layer = hparams.n_layer();

    // others are no Megrez2's, and less is known of what a damaged one does; "test" is that of test-llama-archs
    std::string vocab;
    if (ml.get_key(LLM_KV_TOKENIZER_MODEL, vocab, false) && vocab != "gpt2" && vocab != "test") {
        throw std::runtime_error(format("tokenizer.ggml.model = %s, expected gpt2", vocab.c_str()));
    }
    if (!hparams.causal_attn) {
        throw std::runtime_error("attention.causal = false: this model's attention is causal");
    }

    const auto find = [&](llm_tensor tensor, int il) {
        return ml.get_tensor_meta(LLM_TN(arch)(tensor, "weight", il).str().c_str());
    };

    std::vector<int> routers; // layers that have one
    std::vector<int> pools;
    for (int il = 0; il < n_layer; ++il) {
        if (find(LLM_TENSOR_FFN_GATE_INP, il)) {
            routers.push_back(il);
        }
        if (find(LLM_TENSOR_FFN_GATE_EXPS, il)) {
            pools.push_back(il);
        }
    }

    // what a file leaves out its tensors say; a model made in memory has all keys, and no tensors yet
    const bool required = routers.empty() || pools.empty();

    const auto width = [&](llm_tensor tensor, const std::vector<int> & layers) -> uint32_t {
        const ggml_tensor * t = layers.empty() ? nullptr : find(tensor, layers.front());
        return t ? t->ne[1] : 0;
    };

    hparams.n_layer_dense_lead       = required ? 0 : routers.front();
    hparams.experts_shared_frequency = pools.size() > 1 ? pools[1] - pools[0] : n_layer;
    hparams.moe_every_n_layers       = 1;
    hparams.n_ff_shexp               = width(LLM_TENSOR_FFN_GATE_SHEXP, routers);
    hparams.expert_pre_gate          = true;
    hparams.expert_gating_func       = LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID;
    hparams.expert_weights_norm      = true;
    std::fill_n(hparams.n_ff_exp_arr.begin(), hparams.n_layer_all, width(LLM_TENSOR_FFN_GATE_EXPS, pools));

    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS,       hparams.f_norm_rms_eps);
    ml.get_key(LLM_KV_ROPE_SCALING_YARN_BETA_FAST,       hparams.yarn_beta_fast,           false);
    ml.get_key(LLM_KV_ROPE_SCALING_YARN_BETA_SLOW,       hparams.yarn_beta_slow,           false);
    ml.get_key(LLM_KV_LEADING_DENSE_BLOCK_COUNT,         hparams.n_layer_dense_lead,       required);
    ml.get_key(LLM_KV_EXPERTS_SHARED_FREQUENCY,          hparams.experts_shared_frequency, required);
    ml.get_key(LLM_KV_MOE_EVERY_N_LAYERS,                hparams.moe_every_n_layers,       false);
    ml.get_key(LLM_KV_EXPERT_SHARED_COUNT,               hparams.n_expert_shared,          false);
    ml.get_key(LLM_KV_EXPERT_SHARED_FEED_FORWARD_LENGTH, hparams.n_ff_shexp,               required);
    ml.get_key(LLM_KV_EXPERT_PRE_GATE,                   hparams.expert_pre_gate,          false);
    ml.get_key(LLM_KV_EXPERT_GATING_FUNC,                hparams.expert_gating_func,       false);
    ml.get_key(LLM_KV_EXPERT_WEIGHTS_NORM,               hparams.expert_weights_norm,      false);
    ml.get_key(LLM_KV_EXPERT_WEIGHTS_SCALE,              hparams.expert_weights_scale,     false);
    ml.get_key_or_arr(LLM_KV_EXPERT_FEED_FORWARD_LENGTH, hparams.n_ff_exp_arr, hparams.n_layer_all, required);

    if (hparams.expert_gating_func < LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX || hparams.expert_gating_func > LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT) {
        throw std::runtime_error(format("expert_gating_func = %u, expected 1 (softmax) or 2 (sigmoid)", hparams.expert_gating_func));
    }
    if (hparams.experts_shared_frequency == 0) {
        throw std::runtime_error("experts_shared_frequency must be > 0");
    }
    hparams.moe_every_n_layers = std::max(hparams.moe_every_n_layers, 1u);

    std::vector<int> want_routers;
    std::vector<int> want_pools;
    bool is_complete = true; // a pool's layer is no dense one
    for (int il = 0; il < n_layer; ++il) {
        if (is_moe(il)) {
            want_routers.push_back(il);
            if (want_pools.empty() || want_pools.back() != pool_layer(il)) {
                want_pools.push_back(pool_layer(il));
            }
            is_complete = is_complete && is_moe(want_pools.back());
        }
    }
    const bool has_tensors = !ml.weights_map.empty();
    if (want_routers.empty() || !is_complete || (has_tensors && (routers != want_routers || pools != want_pools))) {
        throw std::runtime_error(format("leading_dense_block_count = %u, moe_every_n_layers = %u and experts_shared_frequency = %u "
                "put routers in layers %s and expert pools in layers %s, but the file has them in layers %s and %s",
                hparams.n_layer_dense_lead, hparams.moe_every_n_layers, hparams.experts_shared_frequency,
                to_string(want_routers).c_str(), to_string(want_pools).c_str(), to_string(routers).c_str(), to_string(pools).c_str()));
    }

    switch (n_layer) {
        case 31: type = LLM_TYPE_A3B; break;
        default: type = LLM_TYPE_UNKNOWN;
    }
}

void llama_model_megrez_moe::load_arch_tensors(llama_model_loader & ml) {
    LLAMA_LOAD_LOCALS;

    std::vector<int> pools(n_layer);
    for (int i = 0; i < n_layer; ++i) {
        pools[i] = pool_layer(i);
    }
    experts       = llama_model_experts::load(ml, *this, pools, params.use_extra_bufts);
    expert_counts = llama_expert_counts::load(ml, *this, pools);

    tok_embd = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, 0);

    output_norm = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), {n_embd}, 0);
    output      = create_tensor(tn(LLM_TENSOR_OUTPUT,      "weight"), {n_embd, n_vocab}, TENSOR_NOT_REQUIRED);
    if (output == nullptr) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, TENSOR_DUPLICATED);
    }

    for (int i = 0; i < n_layer; ++i) {
        auto & layer = layers[i];

        const int64_t n_head     = hparams.n_head(i);
        const int64_t n_ff       = hparams.n_ff(i);
        const int64_t n_ff_exp   = hparams.n_ff_exp(i);
        const int64_t n_ff_shexp = hparams.n_ff_shexp;

        layer.attn_norm = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "weight", i), {n_embd}, 0);
        create_tensor_qkv(layer, i, n_embd, n_embd_head_k*n_head, hparams.n_embd_k_gqa(i), hparams.n_embd_v_gqa(i), 0);
        layer.wo        = create_tensor(tn(LLM_TENSOR_ATTN_OUT,  "weight", i), {n_embd_head_v*n_head, n_embd}, 0);
        layer.wo_b      = create_tensor(tn(LLM_TENSOR_ATTN_OUT,  "bias",   i), {n_embd}, TENSOR_NOT_REQUIRED);
        layer.ffn_norm  = create_tensor(tn(LLM_TENSOR_FFN_NORM,  "weight", i), {n_embd}, 0);

        if (!is_moe(i)) {
            layer.ffn_gate = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", i), {n_embd,   n_ff}, 0);
            layer.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP,   "weight", i), {n_embd,   n_ff}, 0);
            layer.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", i), {  n_ff, n_embd}, 0);
            continue;
        }

        layer.ffn_gate_inp    = create_tensor(tn(LLM_TENSOR_FFN_GATE_INP,    "weight", i), {n_embd, n_expert}, 0);
        layer.ffn_exp_probs_b = create_tensor(tn(LLM_TENSOR_FFN_EXP_PROBS_B, "bias",   i), {n_expert}, TENSOR_NOT_REQUIRED);

        if (pools[i] == i && !experts) {
            const int64_t n_row = llama_model_experts::row_size(ml, arch, i, n_ff_exp);

            layer.ffn_gate_exps = create_tensor(tn(LLM_TENSOR_FFN_GATE_EXPS, "weight", i), {  n_embd, n_ff_exp, n_expert}, 0);
            layer.ffn_up_exps   = create_tensor(tn(LLM_TENSOR_FFN_UP_EXPS,   "weight", i), {  n_embd, n_ff_exp, n_expert}, 0);
            layer.ffn_down_exps = create_tensor(tn(LLM_TENSOR_FFN_DOWN_EXPS, "weight", i), {   n_row,   n_embd, n_expert}, 0);
        }

        if (n_ff_shexp > 0) {
            layer.ffn_gate_shexp = create_tensor(tn(LLM_TENSOR_FFN_GATE_SHEXP, "weight", i), {    n_embd, n_ff_shexp}, 0);
            layer.ffn_up_shexp   = create_tensor(tn(LLM_TENSOR_FFN_UP_SHEXP,   "weight", i), {    n_embd, n_ff_shexp}, 0);
            layer.ffn_down_shexp = create_tensor(tn(LLM_TENSOR_FFN_DOWN_SHEXP, "weight", i), {n_ff_shexp,     n_embd}, 0);
        }
    }
}

std::unique_ptr<llm_graph_context> llama_model_megrez_moe::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_megrez_moe::graph::graph(const llama_model_megrez_moe & model, const llm_graph_params & params) :
    llm_graph_context(params) {
    const int64_t n_embd_head_k = hparams.n_embd_head_k();
    const int64_t n_embd_head_v = hparams.n_embd_head_v();

    const auto gating_func = (llama_expert_gating_func_type) hparams.expert_gating_func;

    llm_graph_input_experts * inp_experts = nullptr;
    if (model.experts) {
        inp_experts = (llm_graph_input_experts *) res->add_input(std::make_unique<llm_graph_input_experts>(model, n_tokens));
    }

    ggml_tensor * inpL        = build_inp_embd(model.tok_embd);
    ggml_tensor * inp_pos     = build_inp_pos();
    auto        * inp_attn    = build_attn_inp_kv();
    ggml_tensor * inp_out_ids = build_inp_out_ids();

    // experts a token; in warm-up all, but for those that would be read from the file
    const auto n_used = [&](int il) -> int64_t {
        return cparams.warmup && !inp_experts ? n_expert : hparams.n_expert_used(il);
    };

    const auto build_routing = [&](ggml_tensor * h, int il) {
        const auto & layer = model.layers[il];

        ggml_tensor * logits = build_lora_mm(layer.ffn_gate_inp, h); // [n_expert, n_tokens]
        for (ggml_tensor * t = logits; !ggml_prec_set_acc(t, GGML_PREC_F32); t = t->src[0]) {} // under what adapters add
        cb(logits, "ffn_moe_logits", il);

        ggml_tensor * bias = layer.ffn_exp_probs_b;
        if (inp_experts && inp_experts->has_margin()) {
            ggml_tensor * preferred = inp_experts->prefer(ctx0, logits, il);
            bias = bias ? ggml_add(ctx0, bias, preferred) : preferred;
        }

        const auto routing = build_moe_routing(h, nullptr, nullptr, bias, n_expert, n_used(il),
                hparams.expert_weights_norm, hparams.expert_weights_scale, gating_func, il, logits);

        if (model.expert_counts) {
            ggml_build_forward_expand(gf, model.expert_counts->count(ctx0, routing.experts, il));
        }
        if (inp_experts && hparams.expert_pre_gate) {
            ggml_build_forward_expand(gf, inp_experts->announce(ctx0, routing.experts, il));
        }
        return routing;
    };

    llm_moe_routing routing_next; // of the layer after, where that is known early

    for (int il = 0; il < n_layer; ++il) {
        const auto & layer = model.layers[il];

        llm_moe_routing routing = routing_next;
        routing_next = {};

        ggml_tensor * inpSA = inpL;

        ggml_tensor * cur = build_norm(inpL, layer.attn_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "attn_norm", il);

        {
            auto [Qcur, Kcur, Vcur] = build_qkv(layer, cur,
                    n_embd_head_k, hparams.n_head(il), n_embd_head_k, hparams.n_head_kv(il), n_embd_head_v, hparams.n_head_kv(il), il);

            Qcur = ggml_rope_ext(ctx0, Qcur, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                                 ext_factor, attn_factor, beta_fast, beta_slow);

            Kcur = ggml_rope_ext(ctx0, Kcur, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                                 ext_factor, attn_factor, beta_fast, beta_slow);

            cb(Qcur, "Qcur", il);
            cb(Kcur, "Kcur", il);
            cb(Vcur, "Vcur", il);

            cur = build_attn(inp_attn,
                    layer.wo, layer.wo_b, layer.wo_s,
                    Qcur, Kcur, Vcur, nullptr, nullptr, nullptr, 1.0f/sqrtf(float(n_embd_head_k)), il);
        }
        if (il == n_layer - 1 && inp_out_ids) {
            cur   = ggml_get_rows(ctx0, cur,   inp_out_ids);
            inpSA = ggml_get_rows(ctx0, inpSA, inp_out_ids);
        }
        ggml_tensor * ffn_inp = ggml_add(ctx0, cur, inpSA);
        cb(ffn_inp, "ffn_inp", il);

        ggml_tensor * h = build_norm(ffn_inp, layer.ffn_norm, nullptr, LLM_NORM_RMS, il);
        cb(h, "ffn_norm", il);

        // PRE-GATE: the next layer's experts follow from this layer's h
        if (hparams.expert_pre_gate && il + 1 < n_layer && model.is_moe(il + 1)) {
            ggml_tensor * r = il + 1 == n_layer - 1 && inp_out_ids ? ggml_get_rows(ctx0, h, inp_out_ids) : h;

            routing_next = build_routing(r, il + 1);
        }

        if (model.is_moe(il)) {
            if (!routing.experts) {
                routing = build_routing(h, il);
            }

            // before the routed experts: time for those that are still on their way from the file
            ggml_tensor * shexp = nullptr;
            if (layer.ffn_up_shexp) {
                shexp = build_ffn(h,
                        layer.ffn_up_shexp,   nullptr, layer.ffn_up_shexp_s,
                        layer.ffn_gate_shexp, nullptr, layer.ffn_gate_shexp_s,
                        layer.ffn_down_shexp, nullptr, layer.ffn_down_shexp_s,
                        nullptr, LLM_FFN_SILU, LLM_FFN_PAR, il);
                cb(shexp, "ffn_shexp", il);
                ggml_build_forward_expand(gf, shexp);
            }

            if (inp_experts) {
                routing.experts = inp_experts->acquire(ctx0, routing.experts, h, il);
                cb(routing.experts, "ffn_moe_slots", il);
            }

            const auto & pool = model.layers[model.pool_layer(il)];

            cur = build_moe_ffn(h,
                    nullptr, pool.ffn_up_exps, pool.ffn_gate_exps, pool.ffn_down_exps, nullptr,
                    n_expert, n_used(il),
                    LLM_FFN_SILU, false, 0.0f, gating_func, il,
                    nullptr, nullptr, pool.ffn_up_exps_s, pool.ffn_gate_exps_s, pool.ffn_down_exps_s,
                    routing.experts, routing.weights);

            if (shexp) {
                cur = ggml_add(ctx0, cur, shexp);
            }
        } else {
            cur = build_ffn(h,
                    layer.ffn_up,   nullptr, layer.ffn_up_s,
                    layer.ffn_gate, nullptr, layer.ffn_gate_s,
                    layer.ffn_down, nullptr, layer.ffn_down_s,
                    nullptr, LLM_FFN_SILU, LLM_FFN_PAR, il);
        }
        cb(cur, "ffn_out", il);

        cur = ggml_add(ctx0, cur, ffn_inp);

        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);

        // input for next layer
        inpL = cur;
    }

    ggml_tensor * cur = build_norm(inpL, model.output_norm, nullptr, LLM_NORM_RMS, -1);
    cb(cur, "result_norm", -1);
    res->t_embd = cur;

    cur = build_lora_mm(model.output, cur, model.output_s);
    cb(cur, "result_output", -1);
    res->t_logits = cur;

    ggml_build_forward_expand(gf, cur);
}
