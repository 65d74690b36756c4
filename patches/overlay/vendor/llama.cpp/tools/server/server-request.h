#pragma once

#include "server-common.h"

// Checks the body of an OpenAI request before anything is done with it, as OpenAI's API would: what the parameters may
// be, and what this server does not do. Throws std::invalid_argument, whose text names the parameter, what it is and
// what was expected. `null` is as good as absent. Parameters that it does not know pass.

// POST /v1/chat/completions; messages of the role "developer" become "system", which templates know
void server_check_chat_request(json & body, int32_t n_vocab);

// POST /v1/responses and /v1/messages, before they become requests for chat, which are then checked as above: what their
// conversion takes for granted
void server_check_responses_request(const json & body);
void server_check_anthropic_request(const json & body);

// POST /v1/completions
void server_check_completion_request(const json & body, int32_t n_vocab);
