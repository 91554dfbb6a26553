# What the launchers share; they source it. Each sets me, its name, and dry_run, which is empty or 1.
# shellcheck shell=bash disable=SC2154

say() { echo "$me: $*" >&2; }

fail() {
  say "$@"
  exit 1
}

# The comment at the head of the launcher.
usage() {
  sed -n '1d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "launch/$me"
  exit 0
}

# One line that a shell reads as this command.
quoted() {
  local word line='' quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$quote}'"
    line+="$word "
  done
  echo "${line% }"
}

# Run a command, or print it.
run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Check flags whose value is a whole number: whole --pause 10 --max_restarts 5.
whole() {
  while [ $# -gt 0 ]; do
    [[ $2 =~ ^[0-9]+$ ]] || fail "$1=$2: expected a whole number"
    shift 2
  done
}
