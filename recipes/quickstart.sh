#!/usr/bin/env bash
# The whole path on a small machine: raw text in, a chat endpoint out. `make quickstart` runs it inside .venv.
# Every command is a public script with flags you could type yourself; each is printed before it runs.
#   MODEL=tiny-moe make quickstart     the same with a Mixture-of-Experts
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-tiny}
case "$MODEL" in
  # Copying the arguments of a tool call comes late, and its time depends on rounding: with one epoch 53, 80 and 94 % were exact
  # on CPUs and threads of different kinds, with two 100 % from the worst of these. A large beta keeps DPO near the model it
  # starts from: with 0.1 and 60 steps a run on another kind of CPU lost 6.5 points of Chinese answers, with these 0.8.
  tiny) OUT=out/quickstart SFT_EPOCHS=2 SFT_RATE=1e-3 DPO_RATE=6e-5 DPO_BETA=1.0 DPO_STEPS=90 ;;
  # An expert sees half of the tokens and copies later still (from the same pretrained model 93 % exact with the rate
  # above, 98 % with this one). What is learned so well takes a larger step to be changed by DPO (preference accuracy
  # 86 % with the rate above, 100 % with this one).
  tiny-moe) OUT=out/quickstart-moe SFT_EPOCHS=2 SFT_RATE=1.5e-3 DPO_RATE=1.5e-4 DPO_BETA=0.1 DPO_STEPS=60 ;;
  *) echo "error: MODEL=$MODEL: the quickstart has tiny and tiny-moe" >&2; exit 2 ;;
esac
DATA=$OUT/data
mkdir -p "$OUT"
rm -f "$OUT/stage_times.jsonl"

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # leave nothing running behind

# stage NAME COMMAND...: print the command, run it, note its seconds for the report
stage() {
  local name=$1 start=$SECONDS; shift
  printf '\n\033[1m== %s\033[0m\n$ %s\n' "$name" "$*"
  "$@"
  echo "{\"stage\": \"$name\", \"started\": $start, \"seconds\": $((SECONDS - start))}" >> "$OUT/stage_times.jsonl"
}
# beside NAME COMMAND...: the same in the background, one thread for it and one for what runs meanwhile (two models of
# this size do more on two cores side by side than one after the other); `finish` waits for it and shows its last lines
threads=${OMP_NUM_THREADS:-}
beside() {
  beside_name=$1; export OMP_NUM_THREADS=1
  stage "$@" > "$OUT/$1.log" 2>&1 &
  beside_job=$!
}
finish() {
  if [ -n "$threads" ]; then export OMP_NUM_THREADS=$threads; else unset OMP_NUM_THREADS; fi
  local failed=0; wait "$beside_job" || failed=$?
  printf '\n\033[1m== meanwhile: %s\033[0m\n' "$beside_name"
  sed -n '/^\$ /p' "$OUT/$beside_name.log"; tr '\r' '\n' < "$OUT/$beside_name.log" | tail -n "${1:-1}"
  [ "$failed" = 0 ] || { cat "$OUT/$beside_name.log" >&2; exit "$failed"; }
}

# --- data and tokenizer
stage data python prepare_datasets.py --source tiny --output_dir "$DATA"
stage tokenizer python train_tokenizer.py --mode train --vocab_size 2000 --extra_special_tokens \
  --data_path "$DATA/pretrain/pretrain_data.jsonl" "$DATA/sft/sft_data.jsonl" --save_dir "$OUT/tokenizer"

# --- training: many small steps (512 tokens) learn more per second on two cores than few large ones. The large
#     --adam_epsilon keeps Adam from moving embeddings that the data hardly ever shows: it would scale their tiny
#     gradients up to full steps, and fine-tuning would unlearn the names that only pretraining knows.
SFT=(python train_full_sft.py --data_path "$DATA/sft/sft_data.jsonl" --tokenizer_path "$OUT/tokenizer"
  --max_length 512 --per_device_train_batch_size 2 --num_epochs "$SFT_EPOCHS" --learning_rate "$SFT_RATE"
  --lr_scheduler_type cosine --warmup_steps 20 --adam_beta2 0.98 --adam_epsilon 1e-4)
stage pretrain python train_pretrain.py --data_path "$DATA/pretrain/pretrain_data.jsonl" \
  --tokenizer_path "$OUT/tokenizer" --model_size "$MODEL" --block_size 128 --packing_strategy blocks \
  --per_device_train_batch_size 4 --max_steps 2200 --learning_rate 4e-3 --lr_scheduler_type cosine \
  --warmup_steps 50 --adam_beta2 0.98 --adam_epsilon 1e-5 --output_dir "$OUT/pretrain"
# the control: the same conversations without the pretraining must not answer the exam
[ "$MODEL" != tiny ] || beside control "${SFT[@]}" --init_from_scratch --model_size "$MODEL" --output_dir "$OUT/control"
stage sft "${SFT[@]}" --base_model "$OUT/pretrain" --output_dir "$OUT/sft"
[ "$MODEL" != tiny ] || finish
beside lora python train_lora.py --data_path "$DATA/lora/lora_data.jsonl" --base_model "$OUT/sft" --lora_r 8 \
  --max_length 512 --per_device_train_batch_size 1 --num_epochs 6 --learning_rate 5e-3 \
  --output_dir "$OUT/lora" --merge --merged_dir "$OUT/lora-merged"
stage dpo python train_dpo.py --data_path "$DATA/dpo/dpo_data.jsonl" --model_path "$OUT/sft" --beta "$DPO_BETA" \
  --per_device_train_batch_size 8 --max_steps "$DPO_STEPS" --learning_rate "$DPO_RATE" --rpo_alpha 1.0 --adam_epsilon 1e-5 \
  --output_dir "$OUT/dpo"
finish

# --- evaluation: closed-book exam, tool calls, preferences, bits per byte; --check_transformers asks
#     AutoModelForCausalLM the same questions without our code
EXAM=(--exam "$DATA/exam/exam.jsonl")
beside evaluate-sft python eval_model.py --model_path "$OUT/sft" "${EXAM[@]}" --check_transformers \
  --text "$DATA/pretrain/validation/pretrain_data.jsonl"
if [ "$MODEL" = tiny ]; then
  stage evaluate-control python eval_model.py --model_path "$OUT/control" "${EXAM[@]}" --kinds qa
fi
stage evaluate-lora python eval_model.py --model_path "$OUT/sft" --adapter "$OUT/lora" "${EXAM[@]}" --kinds skill \
  --output_dir "$OUT/lora/eval"
stage evaluate-dpo python eval_model.py --model_path "$OUT/dpo" "${EXAM[@]}" --kinds qa tool refusal \
  --preferences "$DATA/dpo/validation/dpo_data.jsonl" --check_transformers
finish 40

# --- the table, report.json, report.md and loss_curves.png; its exit code is the verdict
verdict=0
python -m smolkit.report --run_dir "$OUT" --model "$MODEL" || verdict=$?

# --- serve the aligned model on a free loopback port and ask it through the openai client
printf '\n\033[1m== serve and ask\033[0m\n'
: > "$OUT/server.log"
python serve_hf.py --model_path "$OUT/dpo" --host 127.0.0.1 --port 0 >> "$OUT/server.log" 2>&1 &
server=$!
url=
for _ in $(seq 120); do
  url=$(grep -oE 'http://127\.0\.0\.1:[0-9]+' "$OUT/server.log" | head -n 1 || true)
  [ -n "$url" ] && python - "$url/health" <<'PYTHON' && break
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=2)
except OSError:
    sys.exit(1)
PYTHON
  kill -0 "$server" 2>/dev/null || { cat "$OUT/server.log" >&2; exit 1; }
  sleep 0.5
done
[ -n "$url" ] || { echo "error: the server did not start in 60 s; see $OUT/server.log" >&2; exit 1; }
ask() {
  printf '\n$ python chat.py --base_url %s/v1 --prompt "%s"%s\n' "$url" "$1" "${2:+ ${*:2}}"
  python chat.py --base_url "$url/v1" --temperature 0 --prompt "$@"
}
ask "What is the job of Nora?"
ask "周梅的宠物是什么？"
ask "Order 25 pieces of warm silk." --tools "$DATA/exam/tools.json"
kill "$server"; wait "$server" 2>/dev/null || true

cat <<END

Report: $OUT/report.md (loss curves in loss_curves.png beside it)
Chat:   python chat.py --model_path $OUT/dpo
Serve:  python serve_hf.py --model_path $OUT/dpo        # then http://127.0.0.1:8000/docs
END
exit "$verdict"
