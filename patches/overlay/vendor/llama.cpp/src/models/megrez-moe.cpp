#include "models.h"

#include "llama-expert-store.h"
#include "llama-ext.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

bool llama_model_megrez_moe::is_moe(int il) const {
    return il >= 0 && (uint32_t) il >= hparams.n_layer_dense_lead && il % hparams.moe_every_n_layers == 0;
}

int llama_model_megrez_moe::pool_layer(int il) const {
    const int lead   = hparams.n_layer_dense_lead;
    const int period = hparams.experts_shared_frequency;

    return lead + (il - lead)/period*period;
}

int llama_model_megrez_moe::n_experts_at_once(int64_t n_tokens) const {
    return (int) std::min<int64_t>(hparams.n_expert, n_tokens*hparams.n_expert_used());
}

int llama_model_megrez_moe::moe_step(int il) const {
    int ret = 0;
    for (int i = 0; i < il; ++i) {
        ret += is_moe(i);
    }
    return ret;
}

//
// hyper-parameters
//

static std::string layers_str(const std::set<int> & layers) {
    std::string ret;
    for (const int il : layers) {
        ret += (ret.empty() ? "" : ", ") + std::to_string(il);
    }
    return ret.empty() ? "none" : ret;
}

// layers of the file that hold the given tensor
static std::set<int> layers_with(const llama_model_loader & ml, const LLM_TN & tn, llm_tensor tensor, int n_layer) {
    std::set<int> ret;
    for (int il = 0; il < n_layer; ++il) {
        if (ml.get_tensor_meta(tn(tensor, "weight", il).str().c_str())) {
            ret.insert(il);
        }
    }
    return ret;
}

void llama_model_megrez_moe::load_arch_hparams(llama_model_loader & ml) {
    const int n_layer = hparams.n_layer();

    const auto refuse = [](const std::string & why) {
        throw std::runtime_error("megrez-moe: " + why);
    };

    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    ml.get_key(LLM_KV_ROPE_SCALING_YARN_BETA_FAST, hparams.yarn_beta_fast, false);
    ml.get_key(LLM_KV_ROPE_SCALING_YARN_BETA_SLOW, hparams.yarn_beta_slow, false);

    const auto routers = layers_with(ml, LLM_TN(arch), LLM_TENSOR_FFN_GATE_INP,  n_layer);
    const auto pools   = layers_with(ml, LLM_TN(arch), LLM_TENSOR_FFN_GATE_EXPS, n_layer);

    // a model made in memory has keys and no tensors yet; in a file, the tensors can say what a key leaves out
    const bool has_tensors = !ml.weights_map.empty();
    if (has_tensors && (routers.empty() || pools.empty())) {
        refuse(routers.empty() ? "no layer has a router (ffn_gate_inp)" : "no layer has an expert pool (ffn_gate_exps)");
    }

    if (!ml.get_key(LLM_KV_LEADING_DENSE_BLOCK_COUNT, hparams.n_layer_dense_lead, !has_tensors)) {
        hparams.n_layer_dense_lead = *routers.begin();
    }

    ml.get_key(LLM_KV_MOE_EVERY_N_LAYERS, hparams.moe_every_n_layers, false);
    hparams.moe_every_n_layers = std::max(hparams.moe_every_n_layers, 1u);

    // without the key: every pool but the last has as many layers as lie between the first two
    if (!ml.get_key(LLM_KV_EXPERTS_SHARED_FREQUENCY, hparams.experts_shared_frequency, !has_tensors)) {
        hparams.experts_shared_frequency = pools.size() > 1 ? *std::next(pools.begin()) - *pools.begin() : n_layer;
    }
    if (hparams.experts_shared_frequency == 0 || hparams.experts_shared_frequency > LLAMA_MAX_LAYERS) {
        refuse(format("experts_shared_frequency = %u, expected 1 to %d", hparams.experts_shared_frequency, LLAMA_MAX_LAYERS));
    }

    std::set<int> want_routers;
    std::set<int> want_pools;
    for (int il = 0; il < n_layer; ++il) {
        if (is_moe(il)) {
            want_routers.insert(il);
            want_pools.insert(pool_layer(il));
        }
    }
    if (want_routers.empty()) {
        refuse(format("leading_dense_block_count = %u leaves no layer of %d with experts", hparams.n_layer_dense_lead, n_layer));
    }
    for (const int il : want_pools) {
        if (!is_moe(il)) {
            refuse(format("moe_every_n_layers = %u makes layer %d dense, which should hold the expert pool of its group",
                    hparams.moe_every_n_layers, il));
        }
    }
    if (has_tensors && routers != want_routers) {
        refuse(format("leading_dense_block_count = %u and moe_every_n_layers = %u put routers (ffn_gate_inp) in layers %s, "
                "but the file has them in layers %s", hparams.n_layer_dense_lead, hparams.moe_every_n_layers,
                layers_str(want_routers).c_str(), layers_str(routers).c_str()));
    }
    if (has_tensors && pools != want_pools) {
        refuse(format("experts_shared_frequency = %u puts expert pools (ffn_gate_exps) in layers %s, "
                "but the file has them in layers %s", hparams.experts_shared_frequency,
                layers_str(want_pools).c_str(), layers_str(pools).c_str()));
    }

    hparams.expert_pre_gate = true;
    ml.get_key(LLM_KV_EXPERT_PRE_GATE, hparams.expert_pre_gate, false);

    hparams.expert_gating_func = LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID;
    ml.get_key(LLM_KV_EXPERT_GATING_FUNC, hparams.expert_gating_func, false);
    if (hparams.expert_gating_func != LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID &&
        hparams.expert_gating_func != LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX) {
        refuse(format("expert_gating_func = %u, expected %d (softmax) or %d (sigmoid)", hparams.expert_gating_func,
                LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX, LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID));
    }

    hparams.expert_weights_norm = true;
    ml.get_key(LLM_KV_EXPERT_WEIGHTS_NORM, hparams.expert_weights_norm, false);
    ml.get_key(LLM_KV_EXPERT_WEIGHTS_SCALE, hparams.expert_weights_scale, false); // 0: not scaled

    // widths: without a key, what the tensors have
    const auto width = [&](llm_tensor tensor, int il) -> uint32_t {
        const ggml_tensor * t = ml.get_tensor_meta(LLM_TN(arch)(tensor, "weight", il).str().c_str());
        return t ? t->ne[1] : 0;
    };

    if (!ml.get_key_or_arr(LLM_KV_EXPERT_FEED_FORWARD_LENGTH, hparams.n_ff_exp_arr, hparams.n_layer_all, !has_tensors)) {
        std::fill_n(hparams.n_ff_exp_arr.begin(), hparams.n_layer_all, width(LLM_TENSOR_FFN_GATE_EXPS, *pools.begin()));
    }
    if (!ml.get_key(LLM_KV_EXPERT_SHARED_FEED_FORWARD_LENGTH, hparams.n_ff_shexp, !has_tensors)) {
        hparams.n_ff_shexp = width(LLM_TENSOR_FFN_GATE_SHEXP, *routers.begin());
    }
    ml.get_key(LLM_KV_EXPERT_SHARED_COUNT, hparams.n_expert_shared, false);

    if (!(hparams.f_norm_rms_eps >= 0.0f)) {
        refuse(format("attention.layer_norm_rms_epsilon = %g, expected 0 or more", hparams.f_norm_rms_eps));
    }
    if (hparams.rope_scaling_type_train == LLAMA_ROPE_SCALING_TYPE_LONGROPE) {
        refuse("rope.scaling.type = longrope, expected none, linear or yarn");
    }
    if (hparams.n_expert == 0) {
        refuse("expert_count is missing or 0");
    }
    for (int il = 1; il < n_layer; ++il) {
        if (hparams.n_head(il) != hparams.n_head() || hparams.n_head_kv(il) != hparams.n_head_kv() ||
            hparams.n_expert_used(il) != hparams.n_expert_used()) {
            refuse(format("layer %d differs from layer 0 in attention.head_count, attention.head_count_kv or expert_used_count "
                    "(%u, %u, %u, expected %u, %u, %u)", il, hparams.n_head(il), hparams.n_head_kv(il), hparams.n_expert_used(il),
                    hparams.n_head(), hparams.n_head_kv(), hparams.n_expert_used()));
        }
    }
    if (hparams.n_head() == 0 || hparams.n_head_kv() == 0 || hparams.n_head() % hparams.n_head_kv() != 0) {
        refuse(format("attention.head_count = %u is not a multiple of attention.head_count_kv = %u", hparams.n_head(), hparams.n_head_kv()));
    }
    if (hparams.n_embd_head_k() != hparams.n_embd_head_v()) {
        refuse(format("attention.key_length = %u differs from attention.value_length = %u", hparams.n_embd_head_k(), hparams.n_embd_head_v()));
    }
    if (hparams.n_rot() == 0 || hparams.n_rot() % 2 != 0 || hparams.n_rot() > hparams.n_embd_head_k()) {
        refuse(format("rope.dimension_count = %u, expected an even number up to attention.key_length = %u", hparams.n_rot(), hparams.n_embd_head_k()));
    }
    if (hparams.n_expert_groups > 1 && hparams.n_expert/hparams.n_expert_groups*hparams.n_group_used < hparams.n_expert_used()) {
        refuse(format("expert_group_used_count = %u of expert_group_count = %u groups cannot supply expert_used_count = %u of expert_count = %u",
                hparams.n_group_used, hparams.n_expert_groups, hparams.n_expert_used(), hparams.n_expert));
    }

    type = n_layer == 31 ? LLM_TYPE_A3B : LLM_TYPE_UNKNOWN;
}

//
// tensors
//

// only what the user asks for counts, not what a file says
static const llama_model_kv_override * find_override(const llama_model_loader & ml, const char * name, llama_model_kv_override_type tag) {
    const auto it = ml.kv_overrides.find(ml.get_arch_name() + "." + name);
    if (it == ml.kv_overrides.end()) {
        return nullptr;
    }
    if (it->second.tag != tag) {
        throw std::runtime_error(format("override '%s' must be %s", it->first.c_str(),
                tag == LLAMA_KV_OVERRIDE_TYPE_INT ? "an integer" : "a boolean"));
    }
    return &it->second;
}

static std::optional<uint64_t> override_int(const llama_model_loader & ml, const char * name) {
    const auto * found = find_override(ml, name, LLAMA_KV_OVERRIDE_TYPE_INT);
    if (found && found->val_i64 < 0) {
        throw std::runtime_error(format("override '%s' is negative", found->key));
    }
    return found ? std::optional<uint64_t>(found->val_i64) : std::nullopt;
}

// experts that stay in the file: tensors of slots take the place of theirs
void llama_model_megrez_moe::load_arch_experts(llama_model_loader & ml, uint64_t max_bytes) {
    const auto refuse = [](const std::string & why) {
        throw std::runtime_error("megrez-moe: an expert cache " + why);
    };
    if (ml.files.empty()) {
        refuse("needs a model that lies in a file");
    }
    if (n_devices() > 0 && n_gpu_layers() > 0) {
        refuse(format("works on the CPU only, and %u layers were to be on a GPU: load with n_gpu_layers = 0, or without the cache", n_gpu_layers()));
    }

    const auto * direct_io = find_override(ml, "expert_cache.direct", LLAMA_KV_OVERRIDE_TYPE_BOOL);

    llama_expert_store::params params;
    params.n_expert        = hparams.n_expert;
    params.max_bytes       = max_bytes;
    params.min_slots       = hparams.n_expert_used();
    params.n_threads       = override_int(ml, "expert_cache.threads").value_or(0);
    params.direct_io       = !direct_io || direct_io->val_bool;
    params.use_extra_bufts = this->params.use_extra_bufts;

    for (const auto & file : ml.files) {
        params.files.push_back(file->file_id());
    }

    const int n_layer = hparams.n_layer();

    std::map<int, int> pool_of; // by layer
    for (int il = 0; il < n_layer; ++il) {
        if (!is_moe(il)) {
            continue;
        }
        if (pool_layer(il) == il) {
            const int64_t n_embd   = hparams.n_embd;
            const int64_t n_ff     = hparams.n_ff_exp(il);
            const int64_t n_expert = hparams.n_expert;

            std::vector<llama_expert_store::part> parts;
            for (const auto tensor : { LLM_TENSOR_FFN_GATE_EXPS, LLM_TENSOR_FFN_UP_EXPS, LLM_TENSOR_FFN_DOWN_EXPS }) {
                const bool is_down = tensor == LLM_TENSOR_FFN_DOWN_EXPS;
                const std::string name = tn(tensor, "weight", il).str();

                const ggml_tensor * t = ml.check_tensor_dims(name, { is_down ? n_ff : n_embd, is_down ? n_embd : n_ff, n_expert }, true, false);
                if (t->type == GGML_TYPE_NVFP4) {
                    refuse("does not hold NVFP4 weights");
                }
                const auto & weight = ml.require_weight(name.c_str());
                parts.push_back({ t->type, t->ne[0], t->ne[1], weight.idx, weight.offs });

                ml.n_created++;
                ml.size_data -= ggml_nbytes(t);
            }
            pool_of[il] = (int) params.pools.size();
            params.pools.push_back(std::move(parts));
        }
        params.steps.push_back(pool_of.at(pool_layer(il)));
    }

    experts = std::make_shared<llama_expert_store>(params);

    for (const auto & [il, pool] : pool_of) {
        layers[il].ffn_gate_exps = experts->weights(pool, 0);
        layers[il].ffn_up_exps   = experts->weights(pool, 1);
        layers[il].ffn_down_exps = experts->weights(pool, 2);
    }

    // a mapping would be read ahead, experts and all
    ml.use_mmap = false;

    LLAMA_LOG_INFO("%s: memory for %d of %zu experts, %.2f MiB each\n", __func__,
            experts->n_slots(), params.n_expert*params.pools.size(), experts->slot_bytes()/1024.0/1024.0);
}

void llama_model_megrez_moe::load_arch_tensors(llama_model_loader & ml) {
    LLAMA_LOAD_LOCALS;

    // refuse what would only fail in a kernel, later and without a name
    for (const auto & [name, weight] : ml.weights_map) {
        const ggml_type type = weight.tensor->type;

        const bool must_be_f32 = ggml_n_dims(weight.tensor) == 1 || name.find(".ffn_gate_inp.") != std::string::npos;
        const bool can_be_read = type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float;

        if (must_be_f32 ? type != GGML_TYPE_F32 : !can_be_read) {
            throw std::runtime_error(format("tensor '%s' has wrong type; expected %s, got %s", name.c_str(),
                    must_be_f32 ? "f32" : "a type for weights", ggml_type_name(type)));
        }
    }

    const int64_t n_embd_q   = n_embd_head_k*n_head;
    const int64_t n_ff_shexp = hparams.n_ff_shexp;

    const auto cache_bytes = override_int(ml, "expert_cache");

    tok_embd = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, 0);

    output_norm = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), {n_embd}, 0);
    output      = create_tensor(tn(LLM_TENSOR_OUTPUT,      "weight"), {n_embd, n_vocab}, TENSOR_NOT_REQUIRED);
    if (output == nullptr) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, TENSOR_DUPLICATED);
    }

    for (int i = 0; i < n_layer; ++i) {
        auto & layer = layers[i];

        layer.attn_norm = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "weight", i), {n_embd}, 0);
        create_tensor_qkv(layer, i, n_embd, n_embd_q, n_embd_k_gqa, n_embd_v_gqa, 0);
        layer.wo        = create_tensor(tn(LLM_TENSOR_ATTN_OUT,  "weight", i), {n_embd_q, n_embd}, 0);
        layer.wo_b      = create_tensor(tn(LLM_TENSOR_ATTN_OUT,  "bias",   i), {n_embd}, TENSOR_NOT_REQUIRED);
        layer.ffn_norm  = create_tensor(tn(LLM_TENSOR_FFN_NORM,  "weight", i), {n_embd}, 0);

        if (!is_moe(i)) {
            const int64_t n_ff_il = hparams.n_ff(i);

            layer.ffn_gate = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", i), { n_embd, n_ff_il}, 0);
            layer.ffn_up   = create_tensor(tn(LLM_TENSOR_FFN_UP,   "weight", i), { n_embd, n_ff_il}, 0);
            layer.ffn_down = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", i), {n_ff_il,  n_embd}, 0);
            continue;
        }

        layer.ffn_gate_inp    = create_tensor(tn(LLM_TENSOR_FFN_GATE_INP,    "weight", i), {n_embd, n_expert}, 0);
        layer.ffn_exp_probs_b = create_tensor(tn(LLM_TENSOR_FFN_EXP_PROBS_B, "bias",   i), {n_expert}, TENSOR_NOT_REQUIRED);

        if (pool_layer(i) == i && !cache_bytes) {
            const int64_t n_ff_exp = hparams.n_ff_exp(i);

            layer.ffn_gate_exps = create_tensor(tn(LLM_TENSOR_FFN_GATE_EXPS, "weight", i), {  n_embd, n_ff_exp, n_expert}, 0);
            layer.ffn_up_exps   = create_tensor(tn(LLM_TENSOR_FFN_UP_EXPS,   "weight", i), {  n_embd, n_ff_exp, n_expert}, 0);
            layer.ffn_down_exps = create_tensor(tn(LLM_TENSOR_FFN_DOWN_EXPS, "weight", i), {n_ff_exp,   n_embd, n_expert}, 0);
        }

        if (n_ff_shexp > 0) {
            layer.ffn_gate_shexp = create_tensor(tn(LLM_TENSOR_FFN_GATE_SHEXP, "weight", i), {    n_embd, n_ff_shexp}, 0);
            layer.ffn_up_shexp   = create_tensor(tn(LLM_TENSOR_FFN_UP_SHEXP,   "weight", i), {    n_embd, n_ff_shexp}, 0);
            layer.ffn_down_shexp = create_tensor(tn(LLM_TENSOR_FFN_DOWN_SHEXP, "weight", i), {n_ff_shexp,     n_embd}, 0);
        }
    }

    if (cache_bytes) {
        load_arch_experts(ml, *cache_bytes);
    }

    // the loader only counts what is left over; name it (weight scales are created after this)
    for (const auto & [name, weight] : ml.weights_map) {
        const auto holds = [&name = name](const auto & it) { return ggml_get_tensor(it.second.get(), name.c_str()) != nullptr; };

        if (experts && name.find("_exps.weight") != std::string::npos) {
            continue; // load_arch_experts() knows all of them
        }
        if (name.find("scale") == std::string::npos && std::none_of(ml.ctx_map.begin(), ml.ctx_map.end(), holds)) {
            throw std::runtime_error(format("tensor '%s' is not expected in this model", name.c_str()));
        }
    }
}

bool llama_model_expert_store_stats(const llama_model * model, llama_expert_store_stats * stats) {
    const auto * megrez = dynamic_cast<const llama_model_megrez_moe *>(model);
    if (!megrez || !megrez->experts) {
        return false;
    }
    *stats = megrez->experts->stats();
    return true;
}

bool llama_model_expert_store_resize(llama_model * model, uint64_t bytes, uint32_t n_ubatch) {
    const auto * megrez = dynamic_cast<const llama_model_megrez_moe *>(model);

    return megrez && megrez->experts && megrez->experts->resize(bytes, megrez->n_experts_at_once(n_ubatch));
}

uint64_t llama_context_compute_bytes(const llama_context * ctx) {
    uint64_t ret = 0;
    for (const auto & [buft, data] : llama_get_memory_breakdown(ctx)) {
        ret += data.compute;
    }
    return ret;
}

//
// graph
//

// the part of a graph that talks to the expert store
class llama_model_megrez_moe::graph_input_experts : public llm_graph_input_i {
public:
    explicit graph_input_experts(const llama_model_megrez_moe & model) : run(*model.experts) {
        ops.reserve(model.hparams.n_layer());
    }

    // starts reading the experts in ids; gives nothing
    ggml_tensor * build_announce(ggml_context * ctx, ggml_tensor * ids, int step) {
        return build(ctx, 1, 1, { ids }, 1, step, [](ggml_tensor * dst, int ith, int, void * userdata) {
            if (ith == 0) {
                const auto * op = (const struct op *) userdata;
                op->run->announce(op->step, to_vector(dst->src[0]));
            }
        });
    }

    // the slots of the experts in ids, once these are there. cur, which goes into the experts, orders this after the
    // layers before
    ggml_tensor * build_acquire(ggml_context * ctx, ggml_tensor * ids, ggml_tensor * cur, int step) {
        return build(ctx, ids->ne[0], ids->ne[1], { ids, cur }, GGML_N_TASKS_MAX, step, [](ggml_tensor * dst, int ith, int, void * userdata) {
            const auto * op = (const struct op *) userdata;
            if (ith == 0) {
                const auto slots = op->run->acquire(op->step, to_vector(dst->src[0]));
                std::copy(slots.begin(), slots.end(), (int32_t *) dst->data);
            } else {
                op->run->assist(op->step);
            }
        });
    }

    void set_input(const llama_ubatch *) override {
        run.begin();
    }

    bool can_reuse(const llm_graph_params &) override {
        return true;
    }

    bool done() override {
        const std::string error = run.end();
        if (!error.empty()) {
            LLAMA_LOG_ERROR("%s: cannot load experts: %s\n", __func__, error.c_str());
        }
        return error.empty();
    }

private:
    struct op {
        llama_expert_store::run * run;
        int step;
    };

    llama_expert_store::run run;
    std::vector<std::unique_ptr<op>> ops;

    static std::vector<int32_t> to_vector(const ggml_tensor * ids) {
        std::vector<int32_t> ret(ids->ne[0]*ids->ne[1]);
        for (int64_t i = 0; i < ids->ne[1]; ++i) {
            memcpy(ret.data() + i*ids->ne[0], (const char *) ids->data + i*ids->nb[1], ids->ne[0]*sizeof(int32_t));
        }
        return ret;
    }

    ggml_tensor * build(ggml_context * ctx, int64_t ne0, int64_t ne1, std::vector<ggml_tensor *> args, int n_tasks, int step, ggml_custom_op_t fun) {
        ops.push_back(std::make_unique<op>(op { &run, step }));
        return ggml_custom_4d(ctx, GGML_TYPE_I32, ne0, ne1, 1, 1, args.data(), (int) args.size(), fun, n_tasks, ops.back().get());
    }
};

std::unique_ptr<llm_graph_context> llama_model_megrez_moe::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

// The activations entering a down projection can exceed F16's range (65504), and kernels narrow what they multiply: to
// F16 for F16 weights; for Q4_1 and Q5_1, where K-quants fall back to, they keep an F16 sum of every 32. There, divide
// each row by its root mean square, at most sqrt(n_ff) away from its largest element, and multiply the product by it
// again. GGML_PREC_F32 on src1 would not do: the CPU backend does not honour it, and CUDA and Vulkan would hand the
// whole product back to the CPU.
struct rescaled_row {
    ggml_tensor * cur;   // [n, ...]
    ggml_tensor * scale; // [1, ...], or null where no scaling is needed
};

static rescaled_row rescale_for(const ggml_tensor * w, ggml_tensor * cur, ggml_context * ctx) {
    if (w->type != GGML_TYPE_F16 && w->type != GGML_TYPE_Q4_1 && w->type != GGML_TYPE_Q5_1) {
        return { cur, nullptr };
    }

    constexpr float eps = 1e-12f; // keeps a row of zeros finite; cancels otherwise

    ggml_tensor * sum   = ggml_sum_rows(ctx, ggml_sqr(ctx, cur));
    ggml_tensor * scale = ggml_sqrt(ctx, ggml_scale_bias(ctx, sum, 1.0f/cur->ne[0], eps));

    return { ggml_rms_norm(ctx, cur, eps), scale };
}

llama_model_megrez_moe::graph::routing llama_model_megrez_moe::graph::build_routing(
        const llama_layer & layer, ggml_tensor * h, int il) {
    const int64_t n_tokens = h->ne[1];

    ggml_tensor * logits = build_lora_mm(layer.ffn_gate_inp, h); // [n_expert, n_tokens]
    for (ggml_tensor * t = logits; !ggml_prec_set_acc(t, GGML_PREC_F32); t = t->src[0]) {} // under what adapters add
    cb(logits, "ffn_moe_logits", il);

    const bool is_softmax = hparams.expert_gating_func == LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX;

    ggml_tensor * probs = is_softmax ? ggml_soft_max(ctx0, logits) : ggml_sigmoid(ctx0, logits);
    cb(probs, "ffn_moe_probs", il);

    // the bias takes part in the selection only: the weights below come from the unbiased probs
    ggml_tensor * selection = probs;
    if (layer.ffn_exp_probs_b) {
        selection = ggml_add(ctx0, probs, layer.ffn_exp_probs_b);
        cb(selection, "ffn_moe_probs_biased", il);
    }

    // group-limited routing as in DeepSeek-V3: a group scores the sum of its best two, the losers are masked
    const int64_t n_group = hparams.n_expert_groups;
    if (n_group > 1 && n_tokens > 0) {
        const int64_t n_per_group = n_expert/n_group;

        ggml_tensor * groups = ggml_reshape_3d(ctx0, selection, n_per_group, n_group, n_tokens);
        ggml_tensor * best   = ggml_argsort_top_k(ctx0, groups, 2);                                                   // [2, n_group, n_tokens]
        ggml_tensor * scores = ggml_get_rows(ctx0, ggml_reshape_4d(ctx0, groups, 1, n_per_group, n_group, n_tokens), best); // [1, 2, n_group, n_tokens]

        scores = ggml_sum_rows(ctx0, ggml_reshape_3d(ctx0, scores, 2, n_group, n_tokens));                            // [1, n_group, n_tokens]
        scores = ggml_reshape_2d(ctx0, scores, n_group, n_tokens);

        ggml_tensor * winners = ggml_argsort_top_k(ctx0, scores, hparams.n_group_used);                               // [n_group_used, n_tokens]
        cb(winners, "ffn_moe_group_topk", il);

        selection = ggml_set_rows(ctx0, ggml_fill(ctx0, groups, -INFINITY), ggml_get_rows(ctx0, groups, winners), winners);
        selection = ggml_reshape_2d(ctx0, selection, n_expert, n_tokens);
        cb(selection, "ffn_moe_probs_masked", il);
    }

    ggml_tensor * ids = ggml_argsort_top_k(ctx0, selection, n_used); // [n_expert_used, n_tokens]
    cb(ids->src[0], "ffn_moe_argsort", il);
    cb(ids, "ffn_moe_topk", il);

    if (experts && hparams.expert_pre_gate) {
        ggml_build_forward_expand(gf, experts->build_announce(ctx0, ids, model.moe_step(il)));
    }

    ggml_tensor * weights = ggml_get_rows(ctx0, ggml_reshape_3d(ctx0, probs, 1, n_expert, n_tokens), ids); // [1, n_expert_used, n_tokens]
    cb(weights, "ffn_moe_weights", il);

    if (hparams.expert_weights_norm) {
        weights = ggml_reshape_2d(ctx0, weights, n_used, n_tokens);

        ggml_tensor * sum = ggml_sum_rows(ctx0, weights); // [1, n_tokens]
        cb(sum, "ffn_moe_weights_sum", il);

        // no division by zero; backends match this sequence to fuse it
        sum = ggml_clamp(ctx0, sum, 1e-20f, INFINITY);
        cb(sum, "ffn_moe_weights_sum_clamped", il);

        weights = ggml_div(ctx0, weights, sum);
        cb(weights, "ffn_moe_weights_norm", il);

        weights = ggml_reshape_3d(ctx0, weights, 1, n_used, n_tokens);
    }
    if (hparams.expert_weights_scale != 0.0f && hparams.expert_weights_scale != 1.0f) {
        weights = ggml_scale(ctx0, weights, hparams.expert_weights_scale);
        cb(weights, "ffn_moe_weights_scaled", il);
    }

    // into the graph at once: with pre-gating that is a whole FFN and attention before the experts run
    ggml_build_forward_expand(gf, weights);

    return { ids, weights };
}

// build_moe_ffn without its routing; it would build the routing here, next to the experts
ggml_tensor * llama_model_megrez_moe::graph::build_experts(
        const llama_layer & pool, const routing & route, ggml_tensor * cur, int il) {
    const int64_t n_tokens = cur->ne[1];

    ggml_tensor * ids = route.ids;
    if (experts) {
        ids = experts->build_acquire(ctx0, ids, cur, model.moe_step(il));
        cb(ids, "ffn_moe_slots", il);
    }

    cur = ggml_reshape_3d(ctx0, cur, n_embd, 1, n_tokens);

    ggml_tensor * up = build_lora_mm_id(pool.ffn_up_exps, cur, ids, pool.ffn_up_exps_s); // [n_ff_exp, n_expert_used, n_tokens]
    cb(up, "ffn_moe_up", il);

    ggml_tensor * gate = build_lora_mm_id(pool.ffn_gate_exps, cur, ids, pool.ffn_gate_exps_s);
    cb(gate, "ffn_moe_gate", il);

    cur = ggml_swiglu_split(ctx0, gate, up);
    cb(cur, "ffn_moe_swiglu", il);

    const auto [row, scale] = rescale_for(pool.ffn_down_exps, cur, ctx0);

    ggml_tensor * down = build_lora_mm_id(pool.ffn_down_exps, row, ids, pool.ffn_down_exps_s); // [n_embd, n_expert_used, n_tokens]
    cb(down, "ffn_moe_down", il);

    ggml_tensor * weighted = ggml_mul(ctx0, down, scale ? ggml_mul(ctx0, route.weights, scale) : route.weights);
    cb(weighted, "ffn_moe_weighted", il);
    ggml_build_forward_expand(gf, weighted);

    // order the views before the adds; warm-up computes every expert and still sums only those in use
    const int64_t n_sum = hparams.n_expert_used();

    std::vector<ggml_tensor *> views(n_sum);
    for (int64_t i = 0; i < n_sum; ++i) {
        views[i] = ggml_view_2d(ctx0, weighted, n_embd, n_tokens, weighted->nb[2], i*weighted->nb[1]);
        ggml_build_forward_expand(gf, views[i]);
    }

    ggml_tensor * out = views[0];
    for (int64_t i = 1; i < n_sum; ++i) {
        out = ggml_add(ctx0, out, views[i]);
        ggml_build_forward_expand(gf, out);
    }
    if (n_sum == 1) {
        out = ggml_cont(ctx0, out);
    }
    cb(out, "ffn_moe_out", il);

    return out;
}

ggml_tensor * llama_model_megrez_moe::graph::build_mlp(
        ggml_tensor * gate, ggml_tensor * gate_s,
        ggml_tensor * up,   ggml_tensor * up_s,
        ggml_tensor * down, ggml_tensor * down_s, ggml_tensor * cur, int il) {
    cur = build_ffn(cur,
            up,      nullptr, up_s,
            gate,    nullptr, gate_s,
            nullptr, nullptr, nullptr,
            nullptr, LLM_FFN_SILU, LLM_FFN_PAR, il);

    const auto [row, scale] = rescale_for(down, cur, ctx0);

    cur = build_lora_mm(down, row, down_s);

    return scale ? ggml_mul(ctx0, cur, scale) : cur;
}

llama_model_megrez_moe::graph::graph(const llama_model_megrez_moe & model, const llm_graph_params & params) :
    llm_graph_context(params), model(model), n_used(model.experts ? hparams.n_expert_used() : n_expert_used) {
    const int64_t n_embd_head = hparams.n_embd_head_k();

    if (model.experts) {
        const int64_t n_needed = model.n_experts_at_once(n_tokens);
        if (n_needed > model.experts->n_reserved()) {
            throw std::runtime_error(format("megrez-moe: a batch of %lld tokens can use %lld experts at once, and the expert cache holds %d: "
                    "make it %llu bytes, or n_ubatch %lld at most", (long long) n_tokens, (long long) n_needed, model.experts->n_reserved(),
                    (unsigned long long) (n_needed*model.experts->slot_bytes()), (long long) (model.experts->n_reserved()/n_used)));
        }
        auto input = std::make_unique<graph_input_experts>(model);
        experts = input.get();
        res->add_input(std::move(input));
    }

    ggml_tensor * inpL        = build_inp_embd(model.tok_embd);
    ggml_tensor * inp_pos     = build_inp_pos();
    auto        * inp_attn    = build_attn_inp_kv();
    ggml_tensor * inp_out_ids = build_inp_out_ids();

    const auto is_routed_early = [&](int il) {
        return hparams.expert_pre_gate && il > 0 && il < n_layer && model.is_moe(il);
    };

    routing route_next = {};

    for (int il = 0; il < n_layer; ++il) {
        const auto & layer = model.layers[il];

        const routing route_early = route_next;

        ggml_tensor * inpSA = inpL;

        ggml_tensor * cur = build_norm(inpL, layer.attn_norm, nullptr, LLM_NORM_RMS, il);
        cb(cur, "attn_norm", il);

        {
            auto [Qcur, Kcur, Vcur] = build_qkv(layer, cur, n_embd_head, n_head, n_head_kv, il);

            Qcur = ggml_rope_ext(ctx0, Qcur, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                                 ext_factor, attn_factor, beta_fast, beta_slow);
            Kcur = ggml_rope_ext(ctx0, Kcur, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale,
                                 ext_factor, attn_factor, beta_fast, beta_slow);
            cb(Qcur, "Qcur", il);
            cb(Kcur, "Kcur", il);
            cb(Vcur, "Vcur", il);

            cur = build_attn(inp_attn,
                    layer.wo, layer.wo_b, layer.wo_s,
                    Qcur, Kcur, Vcur, nullptr, nullptr, nullptr, 1.0f/sqrtf(float(n_embd_head)), il);
        }

        // the last layer computes only the rows whose output is asked for
        if (il == n_layer - 1 && inp_out_ids) {
            cur   = ggml_get_rows(ctx0, cur,   inp_out_ids);
            inpSA = ggml_get_rows(ctx0, inpSA, inp_out_ids);
        }

        ggml_tensor * ffn_inp = ggml_add(ctx0, cur, inpSA);
        cb(ffn_inp, "ffn_inp", il);

        ggml_tensor * h = build_norm(ffn_inp, layer.ffn_norm, nullptr, LLM_NORM_RMS, il);
        cb(h, "ffn_norm", il);

        // PRE-GATE: the next layer's experts follow from this layer's h
        if (is_routed_early(il + 1)) {
            ggml_tensor * r = il + 1 == n_layer - 1 && inp_out_ids ? ggml_get_rows(ctx0, h, inp_out_ids) : h;

            route_next = build_routing(model.layers[il + 1], r, il + 1);
        }

        if (model.is_moe(il)) {
            const routing route = is_routed_early(il) ? route_early : build_routing(layer, h, il);

            // before the routed experts: time for those that are still on their way from the file
            ggml_tensor * shexp = nullptr;
            if (layer.ffn_up_shexp) {
                shexp = build_mlp(
                        layer.ffn_gate_shexp, layer.ffn_gate_shexp_s,
                        layer.ffn_up_shexp,   layer.ffn_up_shexp_s,
                        layer.ffn_down_shexp, layer.ffn_down_shexp_s, h, il);
                cb(shexp, "ffn_shexp", il);
                ggml_build_forward_expand(gf, shexp);
            }

            cur = build_experts(model.layers[model.pool_layer(il)], route, h, il);

            if (shexp) {
                cur = ggml_add(ctx0, cur, shexp);
            }
        } else {
            cur = build_mlp(
                    layer.ffn_gate, layer.ffn_gate_s,
                    layer.ffn_up,   layer.ffn_up_s,
                    layer.ffn_down, layer.ffn_down_s, h, il);
        }
        cb(cur, "ffn_out", il);

        cur = ggml_add(ctx0, cur, ffn_inp);
        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);

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
