"""Code that tests share. Nothing here is a test, and no test module is imported by another module.

Small models and data, in memory
    tiny            networks, batches, states and stage configs for tests of one training step
    programs        training steps of the tiny networks on one device and on meshes, and short runs
    networks        networks with random parameters, and padded batches of tokens, for models/ and sampling/
    padded_arrays   random arrays with uneven masks for core/, and the property that padding changes nothing
    exact_world     a policy whose every response can be listed, so that expectations are sums

Files and servers
    checkpoints     Hugging Face checkpoints of a random llama
    tokenizer_files Hugging Face tokenizers and chat templates
    gguf_files      GGUF files
    trained_stages  models as a stage leaves them
    own_data        the smoke experiment's flags and files of pairs
    experiments     stages that start from such checkpoints
    workdirs        finished work directories, written without training
    http_server     an HTTP server on this machine; hub_server and judge_server are a model hub and a judge
    disk            a full disk

Running the program
    commands        the command line, inside the test's process
    interrupted     the command line in a process that is killed; `resumed` is the experiment it runs
    compilations    how many programs jit compiles
    xla_flags       compilation flags
    memory          compiled programs, dropped before a worker has grown too large

Comparisons with TRL
    against_trl     losses and gradients (`against_trl_online`: the group methods)
    curves          whole training runs (`curves_online`: the online methods)
"""
