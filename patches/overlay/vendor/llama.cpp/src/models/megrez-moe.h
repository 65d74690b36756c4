#pragma once

// Megrez2 (arXiv 2507.17728): a mixture-of-experts decoder in which
//  - a group of consecutive layers shares one pool of routed experts, stored with the group's first layer, and
//  - the router of a layer reads the *previous* layer's normalised FFN input (pre-gating), so a layer's experts are
//    known before the previous layer's FFN and its own attention run.
// Each layer keeps its own router, selection bias and shared experts. Included from models.h.
//
// Experts can stay in the file (llama-expert-store.h). Asked for by key-value overrides of the model:
//  - megrez-moe.expert_cache          int: bytes of memory for experts
//  - megrez-moe.expert_cache.threads  int: threads that read them
//  - megrez-moe.expert_cache.direct   bool: read past the page cache; true by default

class llama_expert_store;

struct llama_model_megrez_moe : public llama_model_base {
    llama_model_megrez_moe(const struct llama_model_params & params) : llama_model_base(params) {}
    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    bool is_moe    (int il) const; // routes to experts, as opposed to a dense FFN
    int  pool_layer(int il) const; // the layer whose tensors hold the experts of il
    int  moe_step  (int il) const; // how many layers with experts come before il
    int  n_experts_at_once(int64_t n_tokens) const; // that one layer may use for so many tokens

    std::shared_ptr<llama_expert_store> experts; // null: all experts are in memory

    class graph_input_experts;

    struct graph : public llm_graph_context {
        graph(const llama_model_megrez_moe & model, const llm_graph_params & params);

    private:
        struct routing {
            ggml_tensor * ids;     // I32 [n_expert_used, n_tokens]
            ggml_tensor * weights; // F32 [1, n_expert_used, n_tokens]
        };

        const llama_model_megrez_moe & model;

        graph_input_experts * experts = nullptr; // with an expert store
        const int64_t         n_used;            // experts a token; in warm-up all, but for those that would be read

        routing       build_routing(const llama_layer & layer, ggml_tensor * h, int il);
        ggml_tensor * build_experts(const llama_layer & pool, const routing & route, ggml_tensor * cur, int il);
        ggml_tensor * build_mlp(
                ggml_tensor * gate, ggml_tensor * gate_s,
                ggml_tensor * up,   ggml_tensor * up_s,
                ggml_tensor * down, ggml_tensor * down_s, ggml_tensor * cur, int il);
    };

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;

private:
    void load_arch_experts(llama_model_loader & ml, uint64_t max_bytes);
};
