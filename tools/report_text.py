"""What the report says besides tables and figures: in English and Greek, and its sources."""

from tools.steps import STEPS

WORDS = {
    "en": {
        "title": "Genre classification and emotion recognition in music",
        "course": "Pattern Recognition, Laboratory 3",
        "school": (
            "School of Electrical and Computer Engineering, National Technical University of Athens"
        ),
        "name": "name",
        "id": "registration number",
        "partners": ("first partner", "second partner"),
        "contents": "Contents",
        "figure": "Figure",
        "table": "Table",
        "step": "Step",
        "own": "Own words",
        "notice": (
            "**This is a draft that a program put together.** The scripts measured the tables and"
            " drew the figures. The words must be yours: write them in place of every box, check"
            " every number that you name, list the sources you used, and delete this box. Every"
            " team of two submits the individual work of its members, and publishing solutions of"
            " the lab is forbidden."
        ),
        "unfit": "Not fit to hand in",
        "smoke": "ran with --smoke, which is only a trial",
        "demo": "ran on the made-up demo data",
        "subset": "trained on a few clips only (--subset)",
        "missing": "Steps not run yet",
        "not run": "Not run yet",
        "more": "What else this step measured, and how to read it",
        "lost": "figure missing",
        "per class": "`{}`, the best LSTM on the validation clips, per class of its test set",
        "origin": "Origin of the numbers",
        "origin columns": "| step | device | torch | librosa | run time |",
        "sources": "Sources",
        "used": "every other source that you used",
        "sources item": "sources",
        "links": "Links of the lab",
        "papers": "Papers on the methods of the steps",
    },
    "el": {
        "title": "Αναγνώριση είδους και συναισθήματος στη μουσική",
        "course": "Αναγνώριση Προτύπων, 3η εργαστηριακή άσκηση",
        "school": (
            "Σχολή Ηλεκτρολόγων Μηχανικών και Μηχανικών Υπολογιστών, Εθνικό Μετσόβιο Πολυτεχνείο"
        ),
        "name": "ονοματεπώνυμο",
        "id": "αριθμός μητρώου",
        "partners": ("πρώτο μέλος", "δεύτερο μέλος"),
        "contents": "Περιεχόμενα",
        "figure": "Σχήμα",
        "table": "Πίνακας",
        "step": "Βήμα",
        "own": "Δικά μας λόγια",
        "notice": (
            "**Αυτό είναι ένα προσχέδιο που συντάχθηκε από πρόγραμμα.** Οι πίνακες και τα σχήματα"
            " προέρχονται από την εκτέλεση του κώδικα. Το κείμενο πρέπει να είναι δικό σας: γράψτε"
            " το στη θέση κάθε πλαισίου, ελέγξτε κάθε αριθμό που αναφέρετε, συμπληρώστε τις πηγές"
            " που χρησιμοποιήσατε και σβήστε αυτό το πλαίσιο. Κάθε ομάδα δύο ατόμων υποβάλλει"
            " αποκλειστικά την εργασία των μελών της. Η δημοσίευση λύσεων του εργαστηρίου"
            " απαγορεύεται."
        ),
        "unfit": "Ακατάλληλο για υποβολή",
        "smoke": "δοκιμαστική μόνο εκτέλεση (--smoke)",
        "demo": "εκτέλεση στα τεχνητά δεδομένα επίδειξης",
        "subset": "εκπαίδευση σε λίγα μόνο δείγματα (--subset)",
        "missing": "Βήματα που δεν έχουν εκτελεστεί ακόμη",
        "not run": "Δεν έχει εκτελεστεί ακόμη",
        "more": "Οι υπόλοιπες μετρήσεις του βήματος και η ερμηνεία τους",
        "lost": "λείπει το σχήμα",
        "per class": (
            "`{}`, το καλύτερο LSTM στο σύνολο επικύρωσης: μετρικές ανά κλάση στο δικό του σύνολο"
            " ελέγχου"
        ),
        "origin": "Προέλευση των μετρήσεων",
        "origin columns": "| βήμα | συσκευή | torch | librosa | χρόνος εκτέλεσης |",
        "sources": "Πηγές",
        "used": "κάθε άλλη πηγή που χρησιμοποιήσατε",
        "sources item": "πηγές",
        "links": "Σύνδεσμοι της εκφώνησης",
        "papers": "Άρθρα για τις μεθόδους των βημάτων",
    },
}

GREEK = {  # step: its title, and its questions in the order of STEPS
    1: (
        "Φασματογραφήματα στην κλίμακα mel",
        "Τι περιέχει ο φάκελος των δεδομένων και τι αλλάζει με τη χρήση GPU;",
        "Ποια δύο δείγματα διαφορετικού είδους επιλέχθηκαν;",
        "Πώς διαβάζονται τα φασματογραφήματα mel και τι περιέχουν οι πίνακες;",
        "Τι πληροφορία δίνουν τα δύο σχήματα και σε τι διαφέρουν τα δύο είδη;",
    ),
    2: (
        "Συγχρονισμός των φασματογραφημάτων στον ρυθμό (beat-synced)",
        "Πόσα χρονικά βήματα έχουν τα φασματογραφήματα, είναι αποδοτική η εκπαίδευση ενός LSTM"
        " σε αυτά και γιατί;",
        "Τι αλλάζει όταν τα χρονικά βήματα συγχρονίζονται στον ρυθμό;",
    ),
    3: (
        "Χρωμογραφήματα",
        "Τα Βήματα 1 και 2 με χρωμογραφήματα: τι δείχνουν και τι αλλάζει με τον συγχρονισμό στον"
        " ρυθμό;",
    ),
    4: (
        "Τα δεδομένα και οι κλάσεις τους",
        "Ποιες λειτουργίες εκτελεί το PyTorch Dataset και τι επιστρέφει;",
        "Ποιες κλάσεις συγχωνεύονται, ποιες αφαιρούνται και γιατί;",
        "Πόσα δείγματα έχει κάθε κλάση πριν και μετά τη διαδικασία αυτή;",
    ),
    5: (
        "Αναγνώριση μουσικού είδους με LSTM",
        "Πώς δέχεται τα φασματογραφήματα το LSTM της 2ης εργαστηριακής άσκησης;",
        "Μπορεί το δίκτυο να υπερπροσαρμοστεί (overfit) σε λίγα batches και τι αποδεικνύει αυτό;",
        "LSTM με φασματογραφήματα mel",
        "LSTM με φασματογραφήματα συγχρονισμένα στον ρυθμό",
        "LSTM με χρωμογραφήματα",
        "LSTM με φασματογραφήματα και χρωμογραφήματα μαζί (extra credit)",
    ),
    6: (
        "Αξιολόγηση των μοντέλων",
        "Ορθότητα (accuracy) κάθε μοντέλου στα σύνολα ελέγχου (test sets)",
        "Ακρίβεια (precision), ανάκληση (recall) και F1-score κάθε κλάσης",
        "Macro-averaged precision, recall και F1-score",
        "Micro-averaged precision, recall και F1-score",
        "Τι πληροφορία δίνει κάθε μετρική, πότε διαφέρουν μεταξύ τους και ποια ταιριάζει στο"
        " πρόβλημα;",
    ),
    7: (
        "Αναγνώριση μουσικού είδους με 2D CNN",
        "Σε τι αντιδρά κάθε επίπεδο ενός CNN; (στιγμιότυπα από το ConvNetJS, ψηφία)",
        "Πόσο καλά αναγνωρίζει τα είδη ένα CNN τεσσάρων επιπέδων;",
        "Ποια είναι η λειτουργία και ο ρόλος των convolution, batch normalization, ReLU και max"
        " pooling;",
        "Μπορεί το CNN να υπερπροσαρμοστεί (overfit) σε λίγα batches;",
        "Πώς συγκρίνεται το CNN με το LSTM του Βήματος 5a;",
    ),
    8: (
        "Εκτίμηση συναισθήματος με παλινδρόμηση",
        "Πώς προσαρμόζονται το καλύτερο LSTM και το CNN για παλινδρόμηση (regression);",
        "Σθένος (valence)",
        "Ενέργεια (energy)",
        "Χορευτικότητα (danceability)",
        "Μέση συσχέτιση Spearman στους τρεις άξονες",
    ),
    9: (
        "Μεταφορά μάθησης (transfer learning)",
        "Ποια είναι τα βασικά συμπεράσματα του άρθρου για τη μεταφορά χαρακτηριστικών; (Yosinski"
        " et al., 2014)",
        "Ποιο μοντέλο επιλέχθηκε για τη μεταφορά και γιατί;",
        "Τα βάρη ποιας εποχής κρατήθηκαν, με ποια μετρική, σε ποιο σύνολο και γιατί;",
        "Προσαρμογή (fine-tuning) σε έναν άξονα του συναισθήματος",
        "Πώς συγκρίνονται τα αποτελέσματα με εκείνα του Βήματος 8;",
    ),
    10: (
        "Μάθηση πολλαπλών προβλημάτων (multitask learning)",
        "Ποια είναι τα βασικά συμπεράσματα του άρθρου για ένα μοντέλο σε πολλά προβλήματα;"
        " (Kaiser et al., 2017)",
        "Πώς συνδυάζει η συνάρτηση κόστους τους τρεις άξονες και με ποια βάρη;",
        "Εκπαίδευση ενός μοντέλου και για τους τρεις άξονες",
        "Πώς συγκρίνονται τα αποτελέσματα με εκείνα του Βήματος 8;",
    ),
    11: (
        "Οπτικοποίηση λανθανουσών αναπαραστάσεων (προαιρετικό)",
        "Ποια διανύσματα λαμβάνονται και από ποια μοντέλα;",
        "Πόσο διαχωρίζει τα είδη η PCA και πώς διαφέρουν οι χώροι των μοντέλων;",
        "Τι αλλάζει με το χειρότερο LSTM του Βήματος 5;",
        "Ποια άλλη μέθοδος μείωσης διαστάσεων ταιριάζει καλύτερα στα δεδομένα;",
    ),
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

PAPERS = {  # first author and year, as the steps name a paper: the paper
    ("Adebayo", 2018): "J. Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018",
    ("Atmaja", 2020): (
        "B. T. Atmaja and M. Akagi, Evaluation of Error- and Correlation-Based Loss Functions for"
        " Multitask Learning Dimensional Speech Emotion Recognition, 2020"
    ),
    ("Bengio", 1994): (
        "Y. Bengio, P. Simard and P. Frasconi, Learning Long-Term Dependencies with Gradient"
        " Descent Is Difficult, IEEE Transactions on Neural Networks 5(2), 1994"
    ),
    ("Ellis", 2007): (
        "D. P. W. Ellis, Beat Tracking by Dynamic Programming, Journal of New Music Research 36(1),"
        " 2007"
    ),
    ("Griffin", 1984): (
        "D. Griffin and J. Lim, Signal Estimation from Modified Short-Time Fourier Transform, IEEE"
        " Transactions on Acoustics, Speech, and Signal Processing 32(2), 1984"
    ),
    ("Guo", 2017): "C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017",
    ("Hochreiter", 1991): (
        "S. Hochreiter, Untersuchungen zu dynamischen neuronalen Netzen, diploma thesis, TU"
        " München, 1991"
    ),
    ("Ioffe", 2015): (
        "S. Ioffe and C. Szegedy, Batch Normalization: Accelerating Deep Network Training by"
        " Reducing Internal Covariate Shift, ICML 2015"
    ),
    ("Kaiser", 2017): "Ł. Kaiser et al., One Model To Learn Them All, arXiv:1706.05137, 2017",
    ("Karpathy", 2019): "A. Karpathy, A Recipe for Training Neural Networks, 2019 (link [13])",
    ("Kendall", 2018): (
        "A. Kendall, Y. Gal and R. Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses"
        " for Scene Geometry and Semantics, CVPR 2018"
    ),
    ("Kumar", 2022): (
        "A. Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform"
        " Out-of-Distribution, ICLR 2022"
    ),
    ("Loshchilov", 2019): (
        "I. Loshchilov and F. Hutter, Decoupled Weight Decay Regularization, ICLR 2019"
    ),
    ("Maaten", 2008): (
        "L. van der Maaten and G. Hinton, Visualizing Data using t-SNE, Journal of Machine Learning"
        " Research 9, 2008"
    ),
    ("McInnes", 2018): (
        "L. McInnes, J. Healy and J. Melville, UMAP: Uniform Manifold Approximation and Projection"
        " for Dimension Reduction, arXiv:1802.03426, 2018"
    ),
    ("Menon", 2021): "A. K. Menon et al., Long-tail learning via logit adjustment, ICLR 2021",
    ("Park", 2019): (
        "D. S. Park et al., SpecAugment: A Simple Data Augmentation Method for Automatic Speech"
        " Recognition, Interspeech 2019"
    ),
    ("Petsiuk", 2018): (
        "V. Petsiuk, A. Das and K. Saenko, RISE: Randomized Input Sampling for Explanation of"
        " Black-box Models, BMVC 2018"
    ),
    ("Santurkar", 2018): (
        "S. Santurkar et al., How Does Batch Normalization Help Optimization?, NeurIPS 2018"
    ),
    ("Sundararajan", 2017): (
        "M. Sundararajan, A. Taly and Q. Yan, Axiomatic Attribution for Deep Networks, ICML 2017"
    ),
    ("Szegedy", 2016): (
        "C. Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016"
    ),
    ("Tenenbaum", 2000): (
        "J. B. Tenenbaum, V. de Silva and J. C. Langford, A Global Geometric Framework for"
        " Nonlinear Dimensionality Reduction, Science 290, 2000"
    ),
    ("Venna", 2001): (
        "J. Venna and S. Kaski, Neighborhood Preservation in Nonlinear Projection Methods: An"
        " Experimental Study, ICANN 2001"
    ),
    ("Yosinski", 2014): (
        "J. Yosinski et al., How transferable are features in deep neural networks?, NIPS 2014"
    ),
    ("Zhang", 2018): ("H. Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018"),
}


def chapter_words(number, lang) -> tuple[str, dict[str, str]]:
    """A step's title and its questions by item, in the report's language."""
    step = STEPS[number]
    if lang == "en":
        return step.title, step.questions
    title, *questions = GREEK[number]
    return title, dict(zip(step.questions, questions, strict=True))
