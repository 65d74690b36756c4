#pragma once

#include "server-common.h"

#include "llama.h"

#include <string>

// What the experts of a model are doing: how often routers chose each, and what the store of those that stay in the
// model's file has done. See src/llama-expert-counts.h and src/llama-expert-store.h.

// the answer to GET /experts
json server_experts_json(const llama_model * model);

// the store's figures for GET /metrics, in Prometheus' text format; empty without a store
std::string server_experts_metrics(const llama_model * model);
