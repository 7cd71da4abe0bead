"""nanochat: a ChatGPT-like model of your own, from the first byte to the last reply.

The map, in pipeline order. A module imports only from modules above it, and `dataset` alone from
the package `primer`, the embedded world. `tasks` import from all of these, `scripts` from both.
tests/test_layout.py reads this list and holds the order.

    common         folders, whole-file writes, user errors; device, ranks; how a script starts
    tokenizer      text <-> ids; conversation -> ids and loss mask; alone spells special tokens
    dataset        corpora of parquet shards: download, import a folder, write the primer, read
    dataloader     documents or conversations -> packed (B, T) batches, the same on 1 or N ranks
    attention      causal attention under windows: flash, flex or dense, one choice of kernel
    kv_cache       keys and values of the past, one slot per sequence
    loss           norm, relu squared, rotation, and the loss over the vocabulary in chunks
    fp8            linear layers that train in 8-bit floats
    gpt            ids -> logits; all initialisation in one function
    optim          Muon + AdamW in one class, for one rank or many
    scaling        depth -> sizes, tokens, batch, learning rates, schedules, FLOPs, memory; cards
    checkpoint     save and load model, optimizer and loader state: atomic, verified
    trainer        what trainers share: lock, resume, clock, metrics, faults, micro-batches
    core_eval      evaluation of a base model: the CORE metric with its data, and bits per byte
    calculator     the tool: arithmetic and .count() by walking the syntax tree, never eval
    sampling       logits -> next id: temperature, top-k, top-p, one seed per sequence
    engine         many requests at once: prefill, batched decode, tool calls, prefix reuse
    sandbox_child  inside the sandbox: a program and its checks, in two processes on one wire
    sandbox        run model-written Python isolated and within limits
    task_eval      tasks, and categorical and generative evaluation of a chat model on one
    report         what each stage wrote -> report.md, report.html, report.json
    finetuning     what midtraining and SFT share
    runs           the runs in the base folder -> what the page /runs shows
    hf_modeling    a model with the additions as transformers runs it; exports carry the file
    hf_export      settings, tensor names, tokenizer and chat template for transformers
    chat_api       OpenAI's API: what a request may say, what a client sees of an answer
    jobs           an engine in its thread, its jobs, the metrics
    server         the routes, the models, the page
    replicas       one server process per GPU behind one listener
"""
