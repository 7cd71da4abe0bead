"""nanochat: a ChatGPT-like model of your own, from the first byte to the last reply.

The map: every module in pipeline order. A module imports only from modules above it; `tasks` import from
all of these, and `scripts` from both. tests/test_layout.py reads this list and holds the order.

ground
    paths             where each artifact lives; files that appear whole or not at all
    runtime           device, dtype, ranks, seeds; set-up; peak FLOP/s of the device
    flags             a script's command line: shared flags, what values may be, errors in one line
tokenizer
    tokenizer         text <-> ids: rustbpe trains, tiktoken encodes
    chat_format       conversation -> ids and loss mask; the only file that spells a special token
the primer, the embedded world
    primer_words      its words and facts, as tables to read and extend
    primer_facts      its topics: what is true, how it is stated and asked
    primer_texts      its stories, pages and small talk, as templates
    primer_questions  its questions, each with the one right answer; the test split is disjoint
    primer            endless documents, conversations and quizzes from a seed
data
    shards            parquet files of text: write, check, read back
    text_files        the documents in a user's own .txt, .jsonl and .parquet files
    dataset           corpora: download, import a folder of your own, write the primer, list
    packing           documents -> rows of ids: dealt to lanes, packed by best fit
    dataloader        shards -> (B, T) batches; the same global batch on 1 or N ranks; resumable
    chat_loader       conversations -> packed batches with targets masked to -1
model
    kv_cache          keys and values of the past, one slot per sequence
    fused             norm, rotation, relu squared and the chunked loss, with gradients by hand
    fp8               linear layers that train in 8-bit floats
    gpt               ids -> logits; all initialisation in one function
optimizer
    optim             Muon + AdamW in one class, for one rank or many
    schedule          step or progress -> multiplier; pure functions
    scaling           depth -> width, heads, batch, horizon, learning rates, FLOPs
training
    checkpoint        save and load model, optimizer and loader state: atomic, verified
    metrics           console line, metrics.jsonl, optional wandb
    faults            signals, frozen ranks, gradients that are not finite, a GPU that is full
    batching          micro-batches that fit the device; torch.compile
    training          the verbs that every trainer shares: due, accumulate, progress
evaluation of a base model
    bits_per_byte     loss that does not depend on the vocabulary
    core_eval         the CORE metric: few-shot tasks scored by the losses of their options
    eval_bundle       the data of CORE: find or download them, read the tasks
training on conversations
    finetuning        what midtraining and SFT share
engine
    sampling          logits -> next id: temperature, top-k, top-p, one seed per sequence
    calculator        the tool: arithmetic and .count() by walking the syntax tree, never eval
    slots             which slot of the cache a prompt goes to, and what need not be read again
    flight            a request and what becomes of it: its tokens, tool calls and end
    decode_graph      one decode step of a GPU, captured as a CUDA graph
    engine            the steps that serve many requests at once: read, decode, sample
    replies           tokens of a reply -> text as it comes, and the parts of a message
evaluation and reinforcement of a chat model
    sandbox_child     inside the sandbox: a program and its checks, in two processes on one wire
    sandbox           run model-written Python isolated and within limits
    task_eval         categorical and generative evaluation loops, batched through the engine
    rollouts          sampled answers and their advantages -> batches of the policy gradient
report
    report_page       the parts of a report, each as Markdown and as HTML
    report_plots      metrics.jsonl -> line charts in SVG
    report            reads what each stage wrote -> report.md, report.html, report.json
for other programs
    hf_modeling       a model with the additions as transformers runs it; every export of one carries the file
    hf_export         settings, names of tensors, tokenizer and chat template in the words of transformers
serving
    api               what a request to OpenAI's chat API may say, and how an error is told
    replica           an engine in a thread of its own, and the queues between it and the server
    completion        the tokens of an answer -> what a client sees, whole or in a stream
    server            the chat page and an OpenAI-compatible API
"""
