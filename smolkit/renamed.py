"""What older tools and documents call the arguments of the training scripts: refused with today's spelling.

Nothing is translated silently: a flag of the same name may mean something else elsewhere (`--batch_size` per
process or in all, `--eps` of the norms or of Adam), so the user writes down which is meant.
"""

# Old name → what to write instead, or why there is nothing to write.
TODAY = {
    # transformers and TRL before version 5 and 1
    "evaluation_strategy": "it is --eval_strategy now",
    "max_seq_length": "it is --max_length now (--block_size in pretraining)",
    "seq_length": "it is --max_length (--block_size in pretraining)",
    "sequence_length": "it is --max_length (--block_size in pretraining)",
    "max_prompt_length": "--max_length limits prompt and answer together; a longer pair is dropped, never cut",
    "max_completion_length": "--max_length limits prompt and answer together; a longer pair is dropped, never cut",
    "per_gpu_train_batch_size": "it is --per_device_train_batch_size now",
    "per_gpu_eval_batch_size": "it is --per_device_eval_batch_size now",
    "warmup_ratio": "it is --warmup_steps now: below 1 it is a share of all steps",
    "no_cuda": "it is --use_cpu true now",
    "group_by_length": "it is --train_sampling_strategy group_by_length now",
    "overwrite_output_dir": "it is --resume never here, which starts over",
    "tokenizer": "it is --tokenizer_path DIR",
    "ref_model": "it is --ref_model_path DIR",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment; metrics.jsonl lies in --output_dir",
    "save_safetensors": "weights are always saved as safetensors",
    "half_precision_backend": "there is one backend; --bf16 true or --fp16 true",
    "reference_free": "TRL has dropped it; see --loss_type",
    # of another stage
    "max_length": "rows of pretraining are --block_size tokens long; answers are limited by chat.py --max_length",
    "block_size": "it is --max_length in this stage",
    "beta": "only preferences have it: train_dpo.py --beta",
    "prompt": "it is --sample_prompts, answered at every checkpoint (chat.py --prompt asks a finished model)",
    # hyperparameters of hand-written training scripts
    "train": "P and D are scripts of their own: train_pretrain.py (or train_full_sft.py) and train_dpo.py",
    "batch_size": "it is --per_device_train_batch_size, rows per process and micro-batch",
    "micro_batch_size": "it is --per_device_train_batch_size",
    "total_batch_size": "it follows: --per_device_train_batch_size x row length x --gradient_accumulation_steps x "
    "processes is the tokens of a step",
    "embeddings_dims": "it is --model_overrides hidden_size=N",
    "hidden_size": "it is --model_overrides hidden_size=N",
    "no_of_heads": "it is --model_overrides num_attention_heads=N",
    "num_attention_heads": "it is --model_overrides num_attention_heads=N",
    "no_kv_heads": "it is --model_overrides num_key_value_heads=N",
    "num_key_value_heads": "it is --model_overrides num_key_value_heads=N",
    "no_of_decoder_layers": "it is --model_overrides num_hidden_layers=N",
    "num_hidden_layers": "it is --model_overrides num_hidden_layers=N",
    "intermediate_size": "it is --model_overrides intermediate_size=N",
    "rms_norm_eps": "it is --model_overrides rms_norm_eps=X",
    "attn_dropout": "it is --model_overrides attention_dropout=X",
    "dropout": "it is --model_overrides residual_dropout=X",
    "eps": "it is --model_overrides rms_norm_eps=X (of the norms) or --adam_epsilon X (of the optimizer)",
    "max_lr": "it is --learning_rate",
    "lr": "it is --learning_rate",
    "min_lr": "it is --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr\": X}'",
    "lr_decay_iters": "the schedule ends with the run: --max_steps",
    "warmup_iters": "it is --warmup_steps",
    "lr_warmup_steps": "it is --warmup_steps",
    "weight_decay_optim": "it is --weight_decay",
    "beta_1": "it is --adam_beta1",
    "beta_2": "it is --adam_beta2",
    "clip": "it is --max_grad_norm",
    "total_iters": "it is --max_steps",
    "total_steps": "it is --max_steps",
    "val_epochs": "validation reads --max_eval_rows rows once, every --eval_steps steps",
    "eval_iters": "it is --eval_strategy steps --eval_steps N",
    "eval_check": "it is --eval_strategy steps --eval_steps N",
    "save_checkpoint_iter": "it is --save_steps",
    "checkpoint_every": "it is --save_steps",
    "save_checkpoint_dir": "it is --output_dir",
    "device": "the GPU is used where there is one; --use_cpu true or CUDA_VISIBLE_DEVICES choose otherwise",
    "dtype": "it is --weights_dtype bf16 or fp32 (or --bf16 true, --fp16 true for autocast)",
    "temperature": "samples of a run are greedy; chat.py has --temperature",
    "inference": "inference has scripts of its own: chat.py, serve_hf.py, serve_vllm.py",
    "project_name": "it is --project, with --report_to wandb",
}


def hint(flag: str) -> str:
    """What to write instead of a refused flag: `": it is --max_steps"`, or nothing for an unknown name."""
    text = TODAY.get(flag.partition("=")[0].lstrip("-").replace("-", "_"))
    return f": {text}" if text else ""
