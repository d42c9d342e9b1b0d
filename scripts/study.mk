# The study behind docs/recovery.md: every policy an artifact, made of the one it starts from, then exported and played.
#   make -f scripts/study.mk -j2          on two cores; a later call goes on where an earlier one stopped
# Every job uses one core. NAME-SEED is a policy; runs/study/success/NAME-SEED.json are its episodes, 100 of every task with its
# shared scenes, the same ones for all policies.
export OMP_WAIT_POLICY := passive
seeds := 0 1 2
out := runs/study
dense := reference/dense
job := --workers 1 --threads 1 --evaluate 0

# The settings of the recipe `compress`; training of PPO's CPU-minutes instead of PPO (scripts/controls.toml).
sft := --rate 1e-3 --steps 1100 --demonstrations 120 --dagger-rounds 5 --dagger-episodes 260 --dagger-end 0.7
more := --rate 5e-4 --steps 550 --demonstrations 120 --dagger-rounds 2 --dagger-episodes 260 --dagger-start 0 --dagger-end 0.7
ppo := --iterations 8 --episodes 260 --demonstrations 120

main := sft sft+ppo sft+sft dense+sft
rows := dense pruned $(foreach seed,$(seeds),$(addsuffix -$(seed),$(main)))

.PHONY: all
.SECONDARY:
all: $(rows:%=$(out)/success/%.json)

$(out)/pruned:
	rlrc prune $(dense) $@ --ratio 0.9 --demonstrations 120 $(job)
$(out)/sft-%: | $(out)/pruned
	rlrc sft $(out)/pruned $@ $(sft) --seed $* $(job)
$(out)/sft+ppo-%: | $(out)/sft-%
	rlrc rl $(out)/sft-$* $@ $(ppo) --seed $* $(job)
# Its DAgger scenes are others than those of the SFT before it.
$(out)/sft+sft-%: | $(out)/sft-%
	rlrc sft $(out)/sft-$* $@ $(more) --seed 1$* $(job)
$(out)/dense+sft-%: | $(out)/pruned
	rlrc sft $(dense) $@ $(sft) --seed $* $(job)

$(out)/graphs/dense:
	@mkdir -p $(@D)
	rlrc export $(dense) $@ > /dev/null
$(out)/graphs/%: | $(out)/%
	@mkdir -p $(@D)
	rlrc export $(out)/$* $@ > /dev/null
$(out)/success/%.json: | $(out)/graphs/%
	@mkdir -p $(@D)
	rlrc bench success $*=$(out)/graphs/$* --episodes-per-task 50 --workers 1 --out $@ > /dev/null
