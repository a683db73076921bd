#!/usr/bin/env bash
# Continued pretraining in stages, baseline and EXACT side by side, then conversion and evaluation, as a chain of Slurm jobs:
#
#   slurm/stages.sh --folder runs/NAME --base CHECKPOINT \
#       --stage "4k --config configs/stages/4k.yaml" --stage "8k --config configs/stages/8k.yaml" \
#       --stage "16k --config configs/stages/16k.yaml" \
#       -- --config configs/cpt.yaml --config configs/models/NAME.yaml
#
# Each arm is a chain of its own: every stage starts from the last one's weights, with the census of its own window (tau is a
# quarter of it, unless the stage says otherwise). Where a job fails, what depends on it is cancelled; run the same line again, and it
# submits what is neither finished nor queued. FOLDER/ARM/STAGE is a stage's run, FOLDER/ARM/hf its model, FOLDER/ARM/evaluation its
# numbers, FOLDER/comparison the two arms'.
set -euo pipefail

usage() {
    cat <<'USAGE'
stages.sh --folder DIR [--base CHECKPOINT] --stage "NAME ARGUMENTS" ... [options] -- [arguments of every `exact-megatron train`]
  --folder DIR             where everything goes; on a file system that all nodes see
  --base CHECKPOINT        weights that the first stage starts from; default: none, the first stage starts anew
  --stage "NAME ARGUMENTS" a stage: name of its folder, and what `exact-megatron train` gets for it; in this order
  --arm "NAME ARGUMENTS"   default: "baseline model.exact.enabled=false" and "exact model.exact.enabled=true"
  --evaluate ARGUMENTS     of `exact-megatron evaluate`; default: "--suite distance-probe"; the first two arms are compared.
                           With --tensor-parallel N the last stage's checkpoint is evaluated, else the converted model
  --last train|convert|evaluate   stop after these jobs; default: evaluate
  --sbatch OPTIONS         for the training jobs, for example "--nodes=8 --account=x --time=12:00:00"
  --task-sbatch OPTIONS    for conversion and evaluation, for example "--account=x"
  --dry-run                print what would be submitted, and do nothing
The words of a quoted value are split at blanks: none of them holds a blank or a quote itself. What does stands after --.
In containers DIR and CHECKPOINT are mounted; mount data with CONTAINER_MOUNTS.
USAGE
}

# Refuse a value that came out empty, of an unset variable for example: `key=`, or nothing at all.
not_empty() {
    local word
    for word in "${@:2}"; do
        [[ $word =~ [^[:space:]] && ! $word =~ ^[^=]*=[[:space:]]*$ ]] ||
            die "$1 '$word': a value is empty. Is a variable unset? key=null means none"
    done
}

die() {
    echo "stages.sh: $*" >&2
    exit 2
}

# name_of OPTION NAME
name_of() {
    [[ $2 =~ ^[A-Za-z0-9_][A-Za-z0-9_.+-]*$ ]] ||
        die "$1 $2: it begins with a name, the name of a folder: letters, digits, and _ . + - after the first"
}

SCRIPTS=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
export SCRIPTS
folder='' base='' evaluate='--suite distance-probe' last=evaluate dry_run='' stages=() arms=() training=() task=() labels=' '
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    --) shift && break ;;
    --folder | --base | --stage | --arm | --evaluate | --last | --sbatch | --task-sbatch)
        [ $# -ge 2 ] || die "$1 needs a value"
        [[ $1 =~ ^--(folder|base|last)$ || $2 != *[\"\'$'\n']* ]] ||
            die "$1 $2: it is split at blanks, and quotes are not understood. Leave quotes and line ends out"
        read -ra words <<<"$2"
        [[ $1 =~ sbatch$ ]] || not_empty "$1" "${words[@]:-}" # no options for sbatch are fine
        case $1 in
        --folder) folder=$2 ;;
        --base) base=$2 ;;
        --stage) stages+=("$2") ;;
        --arm) arms+=("$2") ;;
        --evaluate) evaluate=$2 ;;
        --last) last=$2 ;;
        --sbatch) read -ra training <<<"$2" ;;
        --task-sbatch) read -ra task <<<"$2" ;;
        esac
        shift
        ;;
    *) die "unknown argument $1; see --help. Arguments for training stand after --" ;;
    esac
    shift
done
[ -n "$folder" ] || die "--folder is missing; see --help"
[ ${#stages[@]} -gt 0 ] || die "no --stage; see --help"
[ ${#arms[@]} -gt 0 ] || arms=("baseline model.exact.enabled=false" "exact model.exact.enabled=true")
case $last in train | convert | evaluate) ;; *) die "--last $last: train, convert or evaluate" ;; esac
not_empty 'an argument of training' "$@"
# Folders and jobs are named by arm and stage: two of one name would be one run, and go on from each other's checkpoints.
taken=' compare comparison stages.lock '
for arm in "${arms[@]}"; do
    read -ra words <<<"$arm"
    arm=${words[0]}
    name_of --arm "$arm"
    [[ $taken != *" $arm "* ]] || die "--arm $arm: the name is taken, each arm needs its own"
    taken+="$arm "
    used=' convert hf evaluate evaluation '
    for stage in "${stages[@]}"; do
        read -ra words <<<"$stage"
        name_of --stage "${words[0]}"
        [[ $used != *" ${words[0]} "* ]] || die "--stage ${words[0]}: the name is taken, each stage of an arm needs its own"
        used+="${words[0]} "
        [[ $labels != *" $arm.${words[0]} "* ]] || die "--arm $arm with --stage ${words[0]}: another job has the name $arm.${words[0]}"
        labels+="$arm.${words[0]} "
    done
    labels+="$arm.convert $arm.evaluate "
done
folder=$(realpath -m "$folder")
[ -z "$base" ] || base=$(realpath -m "$base")
[ -z "$base" ] || [ -n "$dry_run" ] || [ -e "$base" ] || die "--base $base: there is no such checkpoint"
on_ranks='' # a Hugging Face model is evaluated on one device
case " $evaluate " in *" --tensor-parallel "* | *" --tensor-parallel="*) on_ranks=1 ;; esac
if [ "$last" = evaluate ] && [ -z "$base$on_ranks" ]; then
    case " $* ${stages[*]} ${arms[*]} $evaluate " in
    *" restore_from_path="* | *" --tokenizer "* | *" --tokenizer="*) ;;
    *" distance-probe "* | *" ruler "* | *" nolima "* | *" short "*)
        die "without --base the converted model has no tokenizer to be evaluated with: give --base, or add --tokenizer PATH to --evaluate
(ruler, nolima and short want one in the model's folder too: --last convert first, copy it to ARM/hf, then without --last)" ;;
    esac
fi
# Jobs read what other jobs of the chain wrote; a checkpoint of a converted model has its tokenizer two folders up.
export CONTAINER_MOUNTS=$folder:$folder${base:+,${base%/checkpoints/step_*}:${base%/checkpoints/step_*}}${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}

if [ -z "$dry_run" ]; then
    mkdir -p "$folder" || die "cannot make $folder"
    exec 9>"$folder/stages.lock"
    flock -n 9 || die "another stages.sh is at work in $folder"
fi
# Names that no other folder's jobs have: by them the queue is searched.
prefix=$(basename "$folder").$(cksum <<<"$folder" | cut -c1-6)
submitted=0 stale=()

# submit NAME RUN OUTPUT AFTER SCRIPT ARGUMENT...: sets `job` to the id to wait for, '' where it has finished.
# OUTPUT: what the job makes outside of RUN, or ''. AFTER: ids of the jobs that must have succeeded, joined by ':'.
# What was made from something that is run again is put into `stale`, and from there on nothing is submitted. RUN/slurm/stale
# keeps that until RUN is removed.
submit() {
    local label=$1 name=$prefix.$1 run=$2 output=$3 after=$4 before queued='' finished='' dependency=() options=("${task[@]}")
    shift 4
    [ "$1" != train.sbatch ] || options=("${training[@]}")
    local line="$*" made="$run${output:+ $output}" # sbatch's options may change
    if [ -z "$dry_run" ] || command -v squeue >/dev/null; then
        queued=$(squeue --me --noheader --name="$name" --format=%i 2>&1) || {
            [ -n "$dry_run" ] || die "squeue failed, nothing more is submitted: $queued"
            queued=''
        }
    fi
    [ ! -e "$run/slurm/finished" ] || finished=1
    if [ -z "$queued" ] && { [ -e "$run/slurm/stale" ] || { [ -n "$after" ] &&
        { [ -n "$finished" ] || [ -d "$run/checkpoints" ] || [ -d "${output:-$run/checkpoints}" ]; }; }; }; then
        stale+=("$made")
        [ -n "$dry_run" ] || [ ! -d "$run/slurm" ] || : >"$run/slurm/stale"
        job=again
        return
    fi
    before=$(cat "$run/slurm/submitted" 2>/dev/null || true)
    if [ -n "$queued$finished" ]; then
        [ "$before" = "$line" ] || die "$label was submitted with other arguments:
  then: $before
  now:  $line
Put them back, choose another --folder, or cancel the job and remove $made and what was made from it"
        [ -n "$queued" ] && echo "queued    $label: job $queued" || echo "finished  $label"
        job=$queued
        return
    fi
    # task.sbatch goes on from here where a job was ended after its output was whole.
    [ "${label##*.}" != convert ] || [ ! -e "$output/config.json" ] || [ -e "$run/slurm/running" ] ||
        die "$label: $output exists, and no job of this chain is known to have made it: remove $made, or choose another --folder"
    if [ ${#stale[@]} -gt 0 ]; then
        job=again
        return
    fi
    [ -z "$after" ] || dependency=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
    set -- sbatch --parsable --job-name="$name" --output="$run/slurm/%j.out" "${dependency[@]}" "${options[@]}" "$SCRIPTS/$1" "${@:2}"
    if [ -n "$dry_run" ]; then
        echo "submit    $label"
        printf '          %s\n' "$(printf '%q ' "$@")"
        job="<$label>"
        return
    fi
    mkdir -p "$run/slurm"
    printf '%s\n' "$line" >"$run/slurm/submitted"
    job=$("$@") || die "sbatch failed: what was submitted before stays; run the same line again"
    job=${job%%;*}
    submitted=$((submitted + 1))
    echo "submitted $label: job $job${after:+, after $after}"
}

# sorted_arguments ARGUMENT...: sets `sorted`: all --config FILE first, as the command line wants them, then the rest in its order.
sorted_arguments() {
    local rest=()
    sorted=()
    while [ $# -gt 0 ]; do
        if [ "$1" = --config ] && [ $# -gt 1 ]; then
            sorted+=("$1" "$2")
            shift
        else
            rest+=("$1")
        fi
        shift
    done
    sorted+=("${rest[@]}")
}

evaluations=() evaluated=()
for arm in "${arms[@]}"; do
    read -ra words <<<"$arm"
    arm=${words[0]} arm_arguments=("${words[@]:1}") job='' from=$base run=''
    for stage in "${stages[@]}"; do
        read -ra words <<<"$stage"
        run=$folder/$arm/${words[0]}
        start=()
        [ -z "$from" ] || start=("restore_from_path=$from")
        sorted_arguments "$@" "${words[@]:1}" "${arm_arguments[@]}" "exp_manager.exp_dir=$run" "${start[@]}"
        submit "$arm.${words[0]}" "$run" '' "$job" train.sbatch "${sorted[@]}"
        from=$run
    done
    [ "$last" != train ] || continue
    hf=$folder/$arm/hf
    submit "$arm.convert" "$folder/$arm/convert" "$hf" "$job" task.sbatch "$folder/$arm/convert" \
        convert megatron-to-hf "$run" "$hf"
    [ "$last" != convert ] || continue
    read -ra words <<<"$evaluate"
    model=$hf
    [ -z "$on_ranks" ] || model=$run
    submit "$arm.evaluate" "$folder/$arm/evaluate" "$folder/$arm/evaluation" "$job" task.sbatch "$folder/$arm/evaluate" \
        evaluate "$model" "${words[@]}" --output "$folder/$arm/evaluation"
    evaluations+=("$folder/$arm/evaluation")
    [ -z "$job" ] || evaluated+=("$job")
done
if [ ${#evaluations[@]} -ge 2 ]; then
    after=$(IFS=: && printf '%s' "${evaluated[*]}")
    submit compare "$folder/compare" "$folder/comparison" "$after" task.sbatch "$folder/compare" \
        evaluate compare "${evaluations[0]}" "${evaluations[1]}" --output "$folder/comparison" --names "${arms[0]%% *}" "${arms[1]%% *}"
fi
[ ${#stale[@]} = 0 ] || die "what it starts from is run again, or was: remove
$(printf '  %s\n' "${stale[@]}")
and run the same line again, or choose another --folder. $submitted jobs were submitted, and stay"
[ -n "$dry_run" ] || echo "$submitted jobs submitted. squeue --me shows them; the same line submits what fails until then once more"
