"""GRPO with a Conductor in a loop of your own: the ops need no trainer.

The model is made on the spot. In seconds on a CPU it learns to say more even tokens and fewer distinct ones.
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from maestro_fast import ops
from maestro_fast.weighting import Outcome, WeightContext, build_weight_policy

torch.manual_seed(0)
G, N, P, C, d = 8, 4, 5, 12, 64  # responses per prompt, prompts, tokens of a prompt and of a completion, hidden size
shape = Qwen3Config(
    vocab_size=100,
    hidden_size=d,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    eos_token_id=None,
)
model = Qwen3ForCausalLM(shape)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
names = ("even", "simple")
conductor = build_weight_policy("conductor", names, d)
bounds = torch.arange(0, N * G * C + 1, C)  # completions, packed

for step in range(15):
    prompts = torch.randint(100, (N, P)).repeat_interleave(G, 0)
    everything = torch.ones_like(prompts)
    ids = model.generate(prompts, attention_mask=everything, max_new_tokens=C, do_sample=True, pad_token_id=0)
    hidden = model.model(input_ids=ids).last_hidden_state  # [N * G, P + C, d]: the only forward, no logits

    completions = ids[:, P:]
    even = (completions % 2 == 0).float().mean(1)
    simple = torch.tensor([-len(set(row)) / C for row in completions.tolist()])
    rewards = torch.stack([even, simple], 1)  # [N * G, 2]; NaN where a reward abstains

    h = ops.pool_hidden(hidden.detach(), lengths=torch.full((N * G,), P + C))
    context = WeightContext(names, G, step, rewards, h)
    weights = conductor.weights(context)
    advantages = ops.group_advantages(rewards, weights.weights_BK, G, profile="maestro")
    conductor.observe(Outcome(context, weights, advantages))

    states = hidden[:, P - 1 : -1].flatten(0, 1)  # each state predicts the next token
    logprobs, _ = ops.token_logprobs(states, model.lm_head.weight, completions.flatten())
    loss, metrics = ops.policy_loss(logprobs, advantages.advantages, bounds, config=ops.PolicyLossConfig("grpo"))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"{step:2}  even {even.mean():.2f}  simple {simple.mean():.2f}  weights {weights.expected_BK.mean(0).tolist()}"
    )
