"""What the stages of `egs/*/asr1/run.sh` call: data, tokens, scoring, results. One module a step."""
