"""One right answer to each question of the tutorials, run at the end of the page in its namespace."""

SOLUTIONS = dict(
    accuracy_without_labels='''
def oa(truth, guess): return (truth == guess)[truth != IGNORE].mean()

assert check('accuracy_without_labels/oa', oa)
excess = (table.conf - table.oa).groupby(table.method).mean()
assert check('accuracy_without_labels/overconfident', excess.idxmax(), table)
chosen = table.loc[table.groupby('image_id').conf.idxmax()]
best = table.groupby('image_id').oa.max()[chosen.image_id].to_numpy()
assert check('accuracy_without_labels/pick', float((chosen.oa.to_numpy() == best).mean()), table)
''',
    assess_your_own_maps='''
brightest = error >= np.quantile(error, 0.8)
assert check('assess_your_own_maps/review', float(brightest[wrong].mean()), error, wrong)
inside = (new_source.lower <= new_source.oa) & (new_source.oa <= new_source.upper)
assert check('assess_your_own_maps/covered', float(inside.mean()), new_source)
assert check('assess_your_own_maps/miou', lambda iou: np.nanmean(list(iou.values())))
''',
    build_an_sqed='''
assert check('build_an_sqed/rows', len(table), tiles, ['unet', 'unetformer'])
assert check('build_an_sqed/split_scene', broken.groupby('scene').split.nunique().idxmax(), broken)
assert check('build_an_sqed/forbidden', {'miou', 'n_valid', 'scene', 'method_fp'}, candidates, free)
assert not check('build_an_sqed/forbidden', {'miou', 'scene'}, candidates, free)
''',
    from_labels_to_a_map='''
assert check('from_labels_to_a_map/differ', lambda votes: (votes != votes[:, :1]).any(axis=1).mean())
assert check('from_labels_to_a_map/when', account[account.p_near >= 0.9].labels.iloc[0], account)
assert check('from_labels_to_a_map/enough', lambda half, p: int(np.ceil(1.96**2 * p * (1 - p) / half**2)))
''',
    purify_captions='''
smallest = price[price.shuffled >= 0.9].iloc[0]
assert check('purify_captions/cut', smallest.cut, price)
assert check('purify_captions/price', smallest.clean, price)

def low(score, source, cut):
    score = pd.Series(score)
    return (score < score.groupby(source).transform('quantile', cut)).to_numpy()

assert check('purify_captions/within', low)
''',
    read_a_umap='''
def explained(group, y):
    y = pd.Series(y)
    return y.groupby(group).transform('mean').var(ddof=0) / y.var(ddof=0)

assert check('read_a_umap/explained', explained)
assert check('read_a_umap/skill', lambda knn_mae, mean_mae: max(0, (mean_mae - knn_mae) / mean_mae))
assert check('read_a_umap/surviving', {name for name, value in statements.items() if value >= 0.2}, statements, 0.2)
''',
    train_a_clip='''
def shared(table): return (table.groupby('caption').key.transform('nunique') > 1).mean()

assert check('train_a_clip/shared', shared)
assert check('train_a_clip/chance', np.log(recipe.batch), recipe.batch)

def recall(cosines, k):
    own = np.diag(cosines)
    return np.mean([(row > right).sum() < k for row, right in zip(cosines, own)])

assert check('train_a_clip/recall', recall)
''',
    train_a_quality_model='''
def srocc_within(table): return np.mean([t.oa.corr(t.predicted, 'spearman') for _, t in table.groupby('image_id')])

assert check('train_a_quality_model/within', srocc_within)
assert check('train_a_quality_model/error', board.mae.iloc[1] - board.mae.iloc[0], test)
known = {*zip(random_train.dataset, random_train.scene)}
leaked = [pair in known for pair in zip(random_test.dataset, random_test.scene)]
assert check('train_a_quality_model/leak', np.mean(leaked), random_train, random_test)
''',
    two_branches='''
assert check('two_branches/features', 2 * sum(segmenter.channels), segmenter.channels)
assert not check('two_branches/features', sum(segmenter.channels), segmenter.channels)
assert check('two_branches/gate', lambda seg, sem: seg + seg * sem)
assert check('two_branches/source', (errors.loc[full] - errors.loc['concatenated']).idxmax(), errors)
''',
    which_method='''
def regret(table):
    chosen = table.sort_values('predicted').groupby('image_id').oa.last()
    return (table.groupby('image_id').oa.max() - chosen).mean()

def gain(table):
    chosen = table.sort_values('predicted').groupby('image_id').oa.last()
    return chosen.mean() - table.groupby('method').oa.mean().max()

assert check('which_method/regret', regret)
assert check('which_method/gain', gain)
assert check('which_method/close', float((margin < 0.01).mean()), enough)
''',
)
