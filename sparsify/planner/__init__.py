"""What a plan costs, before it runs, and which plan fits: memory counted, step time measured, sensitivity from one gradient pass.

estimate       memory of one step, size of the adapter, traffic: counted over fake tensors, nothing is loaded
shallow        models of many equal blocks, cut down to three
step_time      seconds of one step, from each distinct shape measured once on this machine
sensitivity    how much of the squared gradient lies where, in one pass
autoplan       the search among them, `sparsify.autoplan`
"""
