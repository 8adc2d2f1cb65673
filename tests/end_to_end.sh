#!/usr/bin/env bash
# A newcomer's minute through the installed command: build shards, train, stop, resume, distil, sample, score, report.
# Usage: end_to_end.sh DIRECTORY_OF_THE_COMMAND
set -euo pipefail
bin=$(cd "$1" && pwd)
catmaps=$bin/catmaps
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CATMAPS_CACHE=$work/cache
cd "$work"

json() { "$bin/python" -c 'import json,sys; d=json.load(sys.stdin); assert eval(sys.argv[1]), (sys.argv[1], d)' "$1"; }
refused() { # command ... : must fail with status 2 and one line that holds the first argument
  local what=$1 status=0 line
  shift
  line=$("$@" 2>&1 >/dev/null) || status=$?
  if [ $status -ne 2 ] || [ "$(wc -l <<<"$line")" -ne 1 ] || ! grep -q -- "$what" <<<"$line"; then
    echo "expected one line about '$what' and status 2, got status $status: $line" >&2
    exit 1
  fi
}

fast=(--training.steps 40 --training.compile False --training.save-every 20 --training.evaluate-every 40
  --training.evaluate-sequences 8)
"$catmaps" train tiny --out base "${fast[@]}" --json | json 'd["complete"] and d["step"] == 40'
"$catmaps" train tiny --out base "${fast[@]}" --restart --json | json 'd["complete"]'
"$catmaps" distill --from base --out map "${fast[@]}" --json | json 'd["complete"]'
for loss in lsd esd ecld; do
  "$catmaps" distill --from base --out "map-$loss" "${fast[@]}" --training.steps 4 --objective.loss $loss --json |
    json 'd["complete"]'
done
for sampler in euler heun flow_map renoise localisation; do
  "$catmaps" sample map --sampler $sampler --num 2 --steps 3 --json | json 'len(d["texts"]) == 2'
done
"$catmaps" sample map --num 1 --show-trajectory | grep -q 't = 1.000'
"$catmaps" sample map --prompt 'the king of ' --tokens 20 --num 2 --json | json 'len(d["texts"]) == 2'
"$catmaps" sample map --infill 'the [[5]] of the' --num 1 --json | json 'd["texts"][0].endswith(" of the")'
"$catmaps" export map --out exported --json | json '"model.safetensors" in d["files"]'
diff <("$catmaps" sample map --num 2) <("$catmaps" sample exported --num 2)
HF_HUB_OFFLINE=1 HF_HOME=$work/hf "$bin/python" -c 'from transformers import AutoModel
print(AutoModel.from_pretrained("exported", trust_remote_code=True).generate(seed=0).tokens_per_forward)'
"$catmaps" show map --html flow.html --infill 'the [[5]] of the' --steps 1 4 --json | json 'd["seconds"]'
"$catmaps" steer map --reward contains:the --particles 4 --num 1 --steps 4 --json | json 'd["texts"]'
"$catmaps" plan 1.7b --gpus 256 --tokens 2.1T --json | json 'd'
"$catmaps" plan tiny --gpus 4 --vocabulary 4096 --simulate --json | json 'd["simulation"]["agrees"]'
"$catmaps" score map --split test --windows 8 --json | json '3 < d["nelbo_bits_per_char"] < 6'
echo 'It was the best of times, it was the worst of times' >own.txt
"$catmaps" score own.txt --json | json 'd["run"] == "words-base" and 1 < d["nelbo_bits_per_char"] < 3'
"$catmaps" sample --num 2 --json | json 'len(d["texts"]) == 2'
"$catmaps" score base own.txt --json | json 'd["characters"] > 40'
"$catmaps" info map --json | json 'd["kind"] == "flow map"'
"$catmaps" report map --num 64 --windows 8 --calls 1 4 --json 2>report.log | json 'd["quality"]' || (cat report.log; exit 1)
grep -q '^4/4 base, Euler, 4 calls' report.log
grep -q '<svg' map/report.html

mkdir texts
for i in $(seq 40); do seq -s ' ' "$i" 400 | sed 's/7/seven/g' >"texts/$i.txt"; done
"$catmaps" data build texts --tokenizer bpe:300 --out shards --json | json 'd["splits"]["train"]["documents"] > 30'
"$catmaps" train tiny --data.shards shards --out own "${fast[@]}" --training.steps 4 --json | json 'd["complete"]'
linear=(--data.shards shards --network.input linear --network.skip False --training.tile-megabytes 1)
"$catmaps" train tiny "${linear[@]}" --out linear "${fast[@]}" --training.steps 4 --json | json 'd["complete"]'
"$catmaps" distill --from linear --out linear-map "${fast[@]}" --training.steps 4 --json | json 'd["complete"]'
"$catmaps" sample linear-map --num 1 --json | json 'd["texts"]'

refused 'misses' "$catmaps" import map --format flm --out imported
refused 'preset' "$catmaps" train nonesuch
refused 'wdth' "$catmaps" train tiny --network.wdth 3
refused 'nowhere' "$catmaps" sample nowhere
refused 'vocabulary' "$catmaps" distill --from base --data.shards shards --out wrong
refused 'resume' "$catmaps" train tiny --out base
head -c 100 base/model.safetensors >damaged && cp damaged base/model.safetensors
refused 'model.safetensors' "$catmaps" sample base
echo "end to end: passed"
