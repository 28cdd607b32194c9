"""Prunes a pretrained model without training, block by block, on calibration data: Wanda, SparseGPT and others.

    python run_oneshot.py --model_name_or_path openai-community/gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config_name wikitext-2-raw-v1 --target_sparsity 0.5 --solver sparsegpt --eval --output_dir out/gpt2

Fine-tune the result with its zeros kept:

    python run_clm.py --model_name_or_path out/gpt2 --dataset_name Salesforce/wikitext \
        --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval --keep_zeros --output_dir out/gpt2-tuned

Local texts: --calibration_file and --validation_file. --dry_run reports what would be pruned, and the memory and time.
A run that was interrupted continues after the last finished block when it is started again. The options are those of
`hf-sparse prune`, and can be in one .json or .yaml file. --plugin my_methods.py loads methods of your own. The script
runs under `accelerate launch` and `torchrun` as well.
"""

from _program import parse_args, run_program

from hf_sparse.oneshot import OneshotArguments, OneshotConfig, run_oneshot


CLASSES = (OneshotArguments, OneshotConfig)


def main(argv: list[str] | None = None) -> None:
    run_oneshot(*parse_args(CLASSES, argv))


if __name__ == "__main__":
    run_program(main, CLASSES)
