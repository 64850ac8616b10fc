"""The kinds of input that were answered wrongly without a word somewhere, and where that was reported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of input, public reports of it (repository#number) and the test module that holds it to its answer."""

    name: str
    reports: tuple[str, ...]
    module: str


KINDS = (
    Kind(
        "runs of byte-fallback tokens in streamed text",
        ("abetlen/llama-cpp-python#372", "mdegans/drama_llama#55"),
        "text",
    ),
    Kind("a special token as a stop string", ("vllm-project/vllm#2123", "LostRuins/koboldcpp#791"), "text"),
    Kind(
        "quantised weights read without their scales",
        ("NVIDIA/TensorRT-Model-Connect#1115", "kekzl/imp#1450"),
        "checkpoints",
    ),
    Kind("tensors beside known ones", ("vllm-project/vllm#11802", "declare-lab/flacuna#2"), "checkpoints"),
    Kind(
        "a tied head with weights of its own",
        ("huggingface/transformers#42612", "vllm-project/vllm#51665"),
        "checkpoints",
    ),
    Kind(
        "ends of sequence in one file of several",
        ("InfiniTensor/InfiniLM#387", "openvinotoolkit/openvino.genai#3583"),
        "checkpoints",
    ),
    Kind(
        "a generation config that is no JSON",
        ("ml-explore/mlx-lm#708", "huggingface/transformers#25389"),
        "checkpoints",
    ),
    Kind("windows of a family that has none", ("huggingface/transformers#38002",), "checkpoints"),
    Kind("a bias entry that the family ignores", ("huggingface/transformers#29553",), "checkpoints"),
    Kind("a stale index beside a single file", ("Blaizzy/mlx-vlm#1464", "Neph0s/CoSER#3"), "checkpoints"),
    Kind(
        "lengths beyond the configuration under scaling",
        ("predibase/lorax#348", "modelscope/ms-swift#4893"),
        "checkpoints",
    ),
    Kind("tensor names of a base model", ("huggingface/transformers#30381",), "checkpoints"),
    Kind("a tokenizer without its vocabulary", ("microsoft/DeBERTa#117",), "checkpoints"),
    Kind("something bound to other weights", ("huggingface/lighteval#1364", "bnnr-team/bnnr#317"), "checkpoints"),
    Kind("adapters that the fast path leaves out", ("unslothai/unsloth#3802", "vllm-project/vllm#41754"), "modules"),
    Kind(
        "position_ids in generate", ("huggingface/transformers#36510", "huggingface/transformers#33938"), "hf_arguments"
    ),
    Kind("prompts in another container", ("langchain-ai/langchain#886", "ed-donner/llm_engineering#1307"), "prompts"),
    Kind("a second beginning of sequence", ("vllm-project/vllm#27515", "abetlen/llama-cpp-python#1439"), "prompts"),
    Kind("a temperature that overflows", ("vllm-project/vllm#890", "QwenLM/Qwen#276"), "prompts"),
    Kind("threads on one model", ("huggingface/transformers#32217", "xorbitsai/inference#54"), "threads"),
    Kind(
        "a forked child that waits for its parent's threads",
        ("facebookresearch/faiss#5206", "OpenMathLib/OpenBLAS#240"),
        "threads",
    ),
    Kind("a model unusable after inference mode", ("unslothai/unsloth#2434", "unslothai/unsloth-zoo#137"), "threads"),
    Kind("more threads than the control group grants", ("ollama/ollama#17916", "tobocop2/lilbee#660"), "threads"),
    Kind(
        "a terminal that cannot show a character",
        ("TheR1D/shell_gpt#659", "hydropix/TranslateBooksWithLLMs#184"),
        "words",
    ),
)
