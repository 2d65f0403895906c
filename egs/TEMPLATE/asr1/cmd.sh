# Where the stages' commands run; sourced by asr.sh. A recipe with a cmd.sh of its own uses that one: copy this file
# there and choose. ESPnet's cmd.sh and its slurm.pl, queue.pl ... do as well, with utils/ of a checkout on PATH.
#   train_cmd    statistics, tokens, perplexity
#   cuda_cmd     training, and decoding with --gpu_inference true
#   decode_cmd   decoding
# A runner is called as `<runner> [--gpu N] [--num_threads N] [--num_nodes N] [JOB=1:4] <log> <command ...>`, where
# --num_threads is the CPUs of a training (--train_threads of run.sh). Options for all its jobs, such as
# --mem 4G --time 12:0:0 --max-jobs-run 20, are written here.
cmd_backend=${cmd_backend:-local}

case "${cmd_backend}" in
    local)   # this machine
        export train_cmd="run.pl"
        export cuda_cmd="run.pl"
        export decode_cmd="run.pl" ;;
    slurm)   # sbatch; partitions and the like stand in conf/slurm.conf of the recipe, else in a few general lines
        export train_cmd="slurm.pl"
        export cuda_cmd="slurm.pl"
        export decode_cmd="slurm.pl" ;;
    *)
        echo "cmd.sh: cmd_backend=${cmd_backend}: expected local or slurm" >&2
        return 1 ;;
esac
