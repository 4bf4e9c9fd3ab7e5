# Our files, by the llama.cpp target that they are compiled into. Paths are relative to this folder.
set(RKV_LLAMA_SOURCES)
set(RKV_GGML_CPU_SOURCES)
