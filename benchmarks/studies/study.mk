# The study behind docs/recovery.md: makes every policy from its parent, exports it, evaluates it and records a row.
#   make -f benchmarks/studies/study.mk -j2          uses two cores, one per job; a later call resumes an interrupted one
# benchmarks/results/recovery/NAME-SEED.json is a row of the study with the outcome of every evaluation episode. All
# policies play the same scenes. Existing rows are not made again.
export OMP_WAIT_POLICY := passive
seeds := 0 1 2
out := runs/study
rows := benchmarks/results/recovery
dense := reference/dense
job := --workers 1 --threads 1 --evaluate 0

# The main recipe uses an expert (DAgger), with the settings of the recipe `rlrc-90`. `more` replaces PPO by training of
# about as many CPU-minutes.
sft := --rate 1e-3 --steps 1100 --demonstrations 120 --dagger-rounds 5 --dagger-episodes 260 --dagger-end 0.7
more := --rate 5e-4 --demonstrations 120 --dagger-rounds 2 --dagger-episodes 260 --dagger-start 0 --dagger-end 0.7
ppo := --iterations 8 --episodes 260

# The scarce regime: one demonstration per task, from a different scene for every seed, and no expert.
few = --demonstrations 1 --first-seed $* --seed $*
short := --rate 1e-3 --steps 300
long := --rate 1e-3 --steps 1500

main := sft sft+ppo sft+sft sft+more dense+sft sft+ppo+int4 sft+ppo+int8
once := cut50+sft cut75+sft random+sft depth+sft distill sft+ppo+awq sft+ppo+gptq
scarce := few-sft few-sft+ppo few-random+sft few-distill few-depth+sft few-long few-dense+sft few-sft+ppo-cold few-sft+ppo-free \
	few-sft+ppo+int4 few-sft+ppo+int8
names := dense dense+int4 dense+int8 pruned random depth cut50 cut75 $(once:%=%-0) $(foreach arm,$(main) $(scarce),$(seeds:%=$(arm)-%))

.PHONY: all rows
.SECONDARY:
all: rows
	rlrc bench latency $$(python benchmarks/studies/study.py shapes $(rows) $(out)/graphs) --out $(out)/latency.json --force > /dev/null
	python benchmarks/studies/study.py summary $(rows) $(out)/latency.json benchmarks/results/recovery.json docs/recovery.md docs/recovery.svg
rows: $(names:%=$(rows)/%.json)

$(out)/pruned:
	rlrc prune $(dense) $@ --ratio 0.9 --demonstrations 120 $(job)
$(out)/random:
	rlrc prune $(dense) $@ --ratio 0.9 --score random $(job)

# The same pruning at lower ratios.
$(out)/cut50 $(out)/cut75:
	rlrc prune $(dense) $@ --ratio 0.$(@:$(out)/cut%=%) --demonstrations 120 $(job)

# As many parameters as `pruned`: nine of the twelve blocks are removed.
$(out)/depth:
	rlrc prune $(dense) $@ --kind depth --scope whole --ratio 0.6885 --demonstrations 120 $(job)

$(out)/sft-%: | $(out)/pruned
	rlrc sft $(out)/pruned $@ $(sft) --seed $* $(job)
$(out)/sft+ppo-%: | $(out)/sft-%
	rlrc rl $(out)/sft-$* $@ $(ppo) --demonstrations 120 --seed $* $(job)
# Its DAgger scenes differ from those of the preceding SFT.
$(out)/sft+sft-%: | $(out)/sft-%
	rlrc sft $(out)/sft-$* $@ $(more) --steps 550 --seed 1$* $(job)
# The same, with enough steps for at least PPO's CPU-minutes.
$(out)/sft+more-%: | $(out)/sft-%
	rlrc sft $(out)/sft-$* $@ $(more) --steps 760 --seed 1$* $(job)
$(out)/dense+sft-%: | $(out)/pruned
	rlrc sft $(dense) $@ $(sft) --seed $* $(job)
# The same recovery for other kinds of pruning.
define recovered
$(out)/$(1)+sft-%: | $(out)/$(1)
	rlrc sft $(out)/$(1) $$@ $(sft) --seed $$* $(job)
endef
$(foreach cut,cut50 cut75 random depth,$(eval $(call recovered,$(cut))))
$(out)/distill-%: | $(out)/pruned
	rlrc distill $(out)/pruned $@ --teacher $(dense) $(sft) --seed $* $(job)

$(out)/few-sft-%: | $(out)/pruned
	rlrc sft $(out)/pruned $@ $(short) $(few) $(job)
$(out)/few-long-%: | $(out)/pruned
	rlrc sft $(out)/pruned $@ $(long) $(few) $(job)
$(out)/few-dense+sft-%:
	rlrc sft $(dense) $@ $(short) $(few) $(job)
$(out)/few-random+sft-%: | $(out)/random
	rlrc sft $(out)/random $@ $(short) $(few) $(job)
$(out)/few-depth+sft-%: | $(out)/depth
	rlrc sft $(out)/depth $@ $(short) $(few) $(job)
$(out)/few-distill-%: | $(out)/pruned
	rlrc distill $(out)/pruned $@ --teacher $(dense) $(short) $(few) $(job)
$(out)/few-sft+ppo-%: | $(out)/few-sft-%
	rlrc rl $(out)/few-sft-$* $@ $(ppo) $(few) $(job)
# Without the critic's warm-up; without the behaviour-cloning term.
$(out)/few-sft+ppo-cold-%: | $(out)/few-sft-%
	rlrc rl $(out)/few-sft-$* $@ $(ppo) $(few) --warmup 0 $(job)
$(out)/few-sft+ppo-free-%: | $(out)/few-sft-%
	rlrc rl $(out)/few-sft-$* $@ $(ppo) $(few) --behaviour-cloning 0 $(job)

# The best policy of each regime, quantized; AWQ and GPTQ calibrate int4 on the golden observations.
$(out)/dense+int4 $(out)/dense+int8:
	rlrc quantize $(dense) $@ --bits $(@:$(out)/dense+int%=%) $(job)
define quantized
$(out)/$(1)+$(2)-%: | $(out)/$(1)-%
	rlrc quantize $(out)/$(1)-$$* $$@ $(3) $(job)
endef
$(foreach arm,sft+ppo few-sft+ppo,$(eval $(call quantized,$(arm),int4,--bits 4)))
$(foreach arm,sft+ppo few-sft+ppo,$(eval $(call quantized,$(arm),int8,--bits 8)))
$(eval $(call quantized,sft+ppo,awq,--method awq))
$(eval $(call quantized,sft+ppo,gptq,--method gptq))

$(out)/graphs/dense:
	@mkdir -p $(@D)
	rlrc export $(dense) $@ > /dev/null
$(out)/graphs/%: | $(out)/%
	@mkdir -p $(@D)
	rlrc export $(out)/$* $@ > /dev/null
$(out)/success/%.json: | $(out)/graphs/%
	@mkdir -p $(@D)
	rlrc bench success $*=$(out)/graphs/$* --episodes-per-task 50 --workers 1 --out $@ > /dev/null
$(rows)/%.json: | $(out)/success/%.json
	@mkdir -p $(@D)
	python benchmarks/studies/study.py row $* $(out)/graphs/$* $(out)/success/$*.json $@
