"""What the report says besides tables and figures, in English and Greek, and its sources."""

import re

LANGUAGES = ("en", "el")
TITLE_PAGE = {
    "en": """\
# Genre classification and emotion recognition in music

**Pattern Recognition, Laboratory 3**

School of Electrical and Computer Engineering, National Technical University of Athens

|  | name | registration number |
| --- | --- | --- |
| first partner | {name1} | {id1} |
| second partner | {name2} | {id2} |

> **This is a draft that a program put together.** The scripts measured the tables and drew the
> figures. The words must be yours: write them in place of every box, check every number that you
> name, list the sources you used, and delete this box. Every team of two submits the individual
> work of its members, and publishing solutions of the lab is forbidden.
""",
    "el": """\
# Αναγνώριση είδους και συναισθήματος στη μουσική

**Αναγνώριση Προτύπων, 3η εργαστηριακή άσκηση**

Σχολή Ηλεκτρολόγων Μηχανικών και Μηχανικών Υπολογιστών, Εθνικό Μετσόβιο Πολυτεχνείο

|  | ονοματεπώνυμο | αριθμός μητρώου |
| --- | --- | --- |
| πρώτο μέλος | {name1} | {id1} |
| δεύτερο μέλος | {name2} | {id2} |

> **Αυτό είναι ένα προσχέδιο που συντάχθηκε από πρόγραμμα.** Οι πίνακες και τα σχήματα προέρχονται
> από την εκτέλεση του κώδικα. Το κείμενο πρέπει να είναι δικό σας: γράψτε το στη θέση κάθε
> πλαισίου, ελέγξτε κάθε αριθμό που αναφέρετε, συμπληρώστε τις πηγές που χρησιμοποιήσατε και σβήστε
> αυτό το πλαίσιο. Κάθε ομάδα δύο ατόμων υποβάλλει αποκλειστικά την εργασία των μελών της. Η
> δημοσίευση λύσεων του εργαστηρίου απαγορεύεται.
""",
}
PAIRS = {
    "contents": ("Contents", "Περιεχόμενα"),
    "figure": ("Figure", "Σχήμα"),
    "table": ("Table", "Πίνακας"),
    "step": ("Step", "Βήμα"),
    "own": ("Own words", "Δικά μας λόγια"),
    "not run": ("Not run yet", "Δεν έχει εκτελεστεί ακόμη"),
    "demo": (
        "Not fit to hand in, made-up demo data",
        "Ακατάλληλο για υποβολή, τεχνητά δεδομένα επίδειξης",
    ),
    "smoke": (
        "Not fit to hand in, only a trial with --smoke",
        "Ακατάλληλο για υποβολή, δοκιμαστική μόνο εκτέλεση (--smoke)",
    ),
    "subset": (
        "Not fit to hand in, trained on a few clips (--subset)",
        "Ακατάλληλο για υποβολή, εκπαίδευση σε λίγα μόνο δείγματα (--subset)",
    ),
    "more": ("What else this step measured", "Οι υπόλοιπες μετρήσεις του βήματος"),
    "per class": (
        "`{}`, the best LSTM on the validation clips, per class of its test set",
        "`{}`, το καλύτερο LSTM στην επικύρωση: μετρικές ανά κλάση στο δικό του σύνολο ελέγχου",
    ),
    "sources": ("Sources", "Πηγές"),
    "used": ("every other source that you used", "κάθε άλλη πηγή που χρησιμοποιήσατε"),
    "links": ("Links of the lab", "Σύνδεσμοι της εκφώνησης"),
    "papers": ("Papers on the methods of the steps", "Άρθρα για τις μεθόδους των βημάτων"),
}
WORDS = {lang: {key: pair[n] for key, pair in PAIRS.items()} for n, lang in enumerate(LANGUAGES)}

GREEK_TITLES = {  # of the steps; tools/steps.py has the English ones
    1: "Φασματογραφήματα στην κλίμακα mel",
    2: "Συγχρονισμός των φασματογραφημάτων στον ρυθμό (beat-synchronised)",
    3: "Χρωμογραφήματα",
    4: "Τα δεδομένα και οι κλάσεις τους",
    5: "Αναγνώριση μουσικού είδους με LSTM",
    6: "Αξιολόγηση των μοντέλων",
    7: "Αναγνώριση μουσικού είδους με 2D CNN",
    8: "Εκτίμηση συναισθήματος με παλινδρόμηση",
    9: "Μεταφορά μάθησης (transfer learning)",
    10: "Μάθηση πολλαπλών προβλημάτων (multitask learning)",
    11: "Οπτικοποίηση λανθανουσών αναπαραστάσεων (προαιρετικό)",
}
LINES = """\
0 What does the data folder hold, and what does a GPU change?
  Τι περιέχει ο φάκελος των δεδομένων και τι αλλάζει με τη χρήση GPU;
1a Which two clips of different genres were drawn?
   Ποια δύο δείγματα διαφορετικού είδους επιλέχθηκαν;
1b How are their mel spectrograms read, and what do the arrays hold?
   Πώς διαβάζονται τα φασματογραφήματα mel και τι περιέχουν οι πίνακες;
1c What do the two pictures show, and how do the two genres differ?
   Τι πληροφορία δίνουν τα δύο σχήματα και σε τι διαφέρουν τα δύο είδη;
2a How many time steps are there, is an LSTM efficient on them, and why?
   Πόσα είναι τα χρονικά βήματα, είναι αποδοτική η εκπαίδευση ενός LSTM σε αυτά και γιατί;
2b What changes when the frames of each beat are joined?
   Τι αλλάζει όταν τα χρονικά βήματα συγχρονίζονται στον ρυθμό;
3 Steps 1 and 2 with chromagrams: what do they show, what does the beat change?
  Τα Βήματα 1 και 2 με χρωμογραφήματα: τι δείχνουν και τι αλλάζει με τον συγχρονισμό στον ρυθμό;
4a What does the PyTorch Dataset do, operation by operation, and what does it return?
   Ποιες λειτουργίες εκτελεί το PyTorch Dataset και τι επιστρέφει;
4b Which classes are merged, which are removed, and why?
   Ποιες κλάσεις συγχωνεύονται, ποιες αφαιρούνται και γιατί;
4c How many clips has each class before and after that?
   Πόσα δείγματα έχει κάθε κλάση πριν και μετά τη διαδικασία αυτή;
5a How does the LSTM of the second lab read these spectrograms?
   Πώς δέχεται τα φασματογραφήματα το LSTM της 2ης εργαστηριακής άσκησης;
5b Can the network overfit a few batches, and what does that prove?
   Μπορεί το δίκτυο να υπερπροσαρμοστεί (overfit) σε λίγα batches και τι αποδεικνύει αυτό;
5c An LSTM on mel spectrograms
   LSTM με φασματογραφήματα mel
5d An LSTM on beat-synchronised spectrograms
   LSTM με φασματογραφήματα συγχρονισμένα στον ρυθμό
5e An LSTM on chromagrams
   LSTM με χρωμογραφήματα
5f An LSTM on spectrograms and chromagrams together (extra credit)
   LSTM με φασματογραφήματα και χρωμογραφήματα μαζί (extra credit)
6a Accuracy of every model on the test sets
   Ορθότητα (accuracy) κάθε μοντέλου στα σύνολα ελέγχου (test sets)
6b Precision, recall and F1 of each class
   Ακρίβεια (precision), ανάκληση (recall) και F1-score κάθε κλάσης
6c Macro-averaged precision, recall and F1
   Macro-averaged precision, recall και F1-score
6d Micro-averaged precision, recall and F1
   Micro-averaged precision, recall και F1-score
6 What does each metric tell, when do they differ, and which one suits this task?
  Τι πληροφορία δίνει κάθε μετρική, πότε διαφέρουν μεταξύ τους και ποια ταιριάζει στο πρόβλημα;
7a What does each layer of a CNN respond to? (screenshots of ConvNetJS, digits)
   Σε τι αντιδρά κάθε επίπεδο ενός CNN; (στιγμιότυπα από το ConvNetJS, ψηφία)
7b How well does a CNN of four layers recognise genres?
   Πόσο καλά αναγνωρίζει τα είδη ένα CNN τεσσάρων επιπέδων;
7c What are convolution, batch normalisation, ReLU and max pooling for?
   Ποια είναι η λειτουργία και ο ρόλος των convolution, batch normalization, ReLU και max pooling;
7d Can the CNN overfit a few batches?
   Μπορεί το CNN να υπερπροσαρμοστεί (overfit) σε λίγα batches;
7e How does the CNN compare with the LSTM of 5a?
   Πώς συγκρίνεται το CNN με το LSTM του Βήματος 5a;
8a How do the best LSTM and the CNN become regressors?
   Πώς προσαρμόζονται το καλύτερο LSTM και το CNN για παλινδρόμηση (regression);
8b Valence
   Σθένος (valence)
8c Energy
   Ενέργεια (energy)
8d Danceability
   Χορευτικότητα (danceability)
8e Mean Spearman correlation over the three axes
   Μέση συσχέτιση Spearman στους τρεις άξονες
9a What does the paper on transferable features conclude? (Yosinski et al., 2014)
   Ποια είναι τα συμπεράσματα του άρθρου για τη μεταφορά χαρακτηριστικών; (Yosinski et al., 2014)
9b Which model was chosen for the transfer, and why?
   Ποιο μοντέλο επιλέχθηκε για τη μεταφορά και γιατί;
9c Which epoch was saved, by which metric on which set, and why?
   Τα βάρη ποιας εποχής κρατήθηκαν, με ποια μετρική, σε ποιο σύνολο και γιατί;
9d Fine-tuning on one axis of emotion
   Προσαρμογή (fine-tuning) σε έναν άξονα του συναισθήματος
9e How do the results compare with step 8?
   Πώς συγκρίνονται τα αποτελέσματα με εκείνα του Βήματος 8;
10a What does the paper on one model for many tasks conclude? (Kaiser et al., 2017)
    Ποια είναι τα συμπεράσματα του άρθρου για ένα μοντέλο σε πολλά προβλήματα; (Kaiser et al., 2017)
10b How does the loss join the three axes, and how are they weighted?
    Πώς συνδυάζει η συνάρτηση κόστους τους τρεις άξονες και με ποια βάρη;
10c Training one model for all three axes
    Εκπαίδευση ενός μοντέλου και για τους τρεις άξονες
10d How do the results compare with step 8?
    Πώς συγκρίνονται τα αποτελέσματα με εκείνα του Βήματος 8;
11a Which vectors are taken from which models?
    Ποια διανύσματα λαμβάνονται και από ποια μοντέλα;
11b How far does PCA separate the genres, and how do the models' spaces differ?
    Πόσο διαχωρίζει τα είδη η PCA και πώς διαφέρουν οι χώροι των μοντέλων;
11c What is different with the worst LSTM of step 5?
    Τι αλλάζει με το χειρότερο LSTM του Βήματος 5;
11d Which other method of dimensionality reduction works best for these data?
    Ποια άλλη μέθοδος μείωσης διαστάσεων ταιριάζει καλύτερα στα δεδομένα;
"""  # what the lab asks, in its order: the item with the English question, then the Greek one
QUESTIONS = {  # item: {language: question}
    item: {"en": english, "el": greek}
    for item, english, greek in re.findall(r"^(\d+[a-h]?) (.+)\n +(.+)$", LINES, re.MULTILINE)
}

LINKS = (  # of the lab sheet, [0] to [20]
    "https://www.kaggle.com/code/geoparslp/lab3-data-loading-tutorial",
    "https://www.kaggle.com/datasets/geoparslp/patreco3-multitask-affective-music",
    "https://www.kaggle.com/c/multitask-affective-music-lab-2022/kernels",
    "https://www.coursera.org/lecture/machine-learning-projects/transfer-learning-WNPap",
    "https://towardsdatascience.com/a-comprehensive-hands-on-guide-to-transfer-learning-with-real-world-applications-in-deep-learning-212bf3b2f27a",
    "http://papers.nips.cc/paper/5347-how-transferable-are-features-in-deep-neural-networks.pdf",
    "http://ruder.io/multi-task/",
    "https://arxiv.org/pdf/1706.05137.pdf",
    "https://github.com/slp-ntua/patrec-labs/tree/main/lab3",
    "https://towardsdatascience.com/multi-class-metrics-made-simple-part-ii-the-f1-score-ebe8b2c2ca1",
    "https://becominghuman.ai/how-to-evaluate-the-machine-learning-models-part-3-ff0dd3b76f9",
    "https://towardsdatascience.com/metrics-for-imbalanced-classification-41c71549bbb5",
    "https://twitter.com/karpathy/status/1013244313327681536",
    "http://karpathy.github.io/2019/04/25/recipe/",
    "https://www.reddit.com/r/MachineLearning/comments/5pidk2/d_is_overfitting_on_a_very_small_data_set_a/",
    "https://colah.github.io/posts/2015-08-Understanding-LSTMs/",
    "https://colah.github.io/posts/2014-07-Understanding-Convolutions/",
    "https://ujjwalkarn.me/2016/08/11/intuitive-explanation-convnets/",
    "https://blog.xrds.acm.org/2016/06/convolutional-neural-networks-cnns-illustrated-explanation/",
    "https://cs.stanford.edu/people/karpathy/convnetjs/",
    "https://towardsdatascience.com/dimensionality-reduction-for-data-visualization-pca-vs-tsne-vs-umap-be4aa7b1cb29",
)

PAPER_LIST = """\
- J. Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018
- B. T. Atmaja and M. Akagi, Evaluation of Error- and Correlation-Based Loss Functions for
  Multitask Learning Dimensional Speech Emotion Recognition, 2020
- Y. Bengio, P. Simard and P. Frasconi, Learning Long-Term Dependencies with Gradient Descent Is
  Difficult, IEEE Transactions on Neural Networks 5(2), 1994
- D. P. W. Ellis, Beat Tracking by Dynamic Programming, Journal of New Music Research 36(1), 2007
- D. Griffin and J. Lim, Signal Estimation from Modified Short-Time Fourier Transform, IEEE
  Transactions on Acoustics, Speech, and Signal Processing 32(2), 1984
- C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017
- S. Hochreiter, Untersuchungen zu dynamischen neuronalen Netzen, diploma thesis, TU München, 1991
- S. Ioffe and C. Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing
  Internal Covariate Shift, ICML 2015
- Ł. Kaiser et al., One Model To Learn Them All, arXiv:1706.05137, 2017
- A. Karpathy, A Recipe for Training Neural Networks, 2019 (link [13])
- A. Kendall, Y. Gal and R. Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for
  Scene Geometry and Semantics, CVPR 2018
- A. Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform
  Out-of-Distribution, ICLR 2022
- L. van der Maaten and G. Hinton, Visualizing Data using t-SNE, Journal of Machine Learning
  Research 9, 2008
- L. McInnes, J. Healy and J. Melville, UMAP: Uniform Manifold Approximation and Projection for
  Dimension Reduction, arXiv:1802.03426, 2018
- V. Petsiuk, A. Das and K. Saenko, RISE: Randomized Input Sampling for Explanation of Black-box
  Models, BMVC 2018
- S. Santurkar et al., How Does Batch Normalization Help Optimization?, NeurIPS 2018
- M. Sundararajan, A. Taly and Q. Yan, Axiomatic Attribution for Deep Networks, ICML 2017
- J. B. Tenenbaum, V. de Silva and J. C. Langford, A Global Geometric Framework for Nonlinear
  Dimensionality Reduction, Science 290, 2000
- J. Venna and S. Kaski, Neighborhood Preservation in Nonlinear Projection Methods: An Experimental
  Study, ICANN 2001
- J. Yosinski et al., How transferable are features in deep neural networks?, NIPS 2014
"""
PAPERS = {  # (surname of the first author, year): the line of the list
    (re.search(r"(\w+)(?:,| and| et al)", paper)[1], int(re.findall(r"\d{4}", paper)[-1])): paper
    for paper in re.findall(r"^- .+(?:\n  .+)*", PAPER_LIST, re.MULTILINE)
}
