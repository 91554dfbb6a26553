# Functions shared by the launch scripts, which source this file. Each script sets `script` to its own file name, and
# `dry_run` to 1 for a dry run and else to the empty string.
# shellcheck shell=bash disable=SC2154

log() { echo "$script: $*" >&2; }

fail() {
  log "$@"
  exit 1
}

# Print the comment at the top of the launch script as its --help text, and exit.
usage() {
  sed -n '1d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "launch/$script"
  exit 0
}

# Print a command as one line, quoted so that a shell reads back the same arguments.
print_command() {
  local word line='' quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$quote}'"
    line+="$word "
  done
  echo "${line% }"
}

# Run a command; in a dry run, print it instead.
run() {
  if [ -n "$dry_run" ]; then print_command "$@"; else "$@"; fi
}

# Exit with an error unless every flag has a whole number as its value. Arguments: FLAG VALUE [FLAG VALUE ...]
require_whole_numbers() {
  while [ $# -gt 0 ]; do
    [[ $2 =~ ^[0-9]+$ ]] || fail "$1=$2: expected a whole number"
    shift 2
  done
}
